"""The sub-commands of `pe-rlhf`, one file each."""
