"""The errors that end a command with one sentence."""


class InputError(ValueError):
    """A recipe, file or argument is wrong.

    The message is one sentence that says what is wrong and where (file, line or key); the command line prints it
    without a traceback and exits with a non-zero code.
    """


class JudgeError(RuntimeError):
    """A judge cannot go on: its server is down, too many answers are invalid, a budget is spent.

    The verdicts so far are kept, and the same command goes on from them.
    """
