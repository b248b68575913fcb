"""Stages run in this process here: what they cache and the threads they set must not outlast a test."""

from tests.stage_support import caches_apart

__all__ = ["caches_apart"]
