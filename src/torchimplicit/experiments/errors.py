"""The one error the command line shows as a single line instead of a traceback."""


class ExperimentError(Exception):
    """Something the person at the keyboard can put right: the message names it and says how."""
