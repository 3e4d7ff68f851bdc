"""The one exception users see."""


class DgmrError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and how to mend it.

    The command line prints the sentence without a traceback and exits with status 2.
    """
