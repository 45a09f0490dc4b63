"""The errors a user meets: one clear line each, naming the file or the key."""


class PPReIDError(Exception):
    """Something the user can mend. The commands print it as one line and exit with status 2."""


class ConfigError(PPReIDError):
    """A configuration key is unknown, mistyped or contradicts another; the message starts with the key."""


class DataError(PPReIDError):
    """Data that can't be used: a folder, picture, shard or index is missing, damaged, inconsistent or can't be written,
    or features and scores don't fit each other. The message names the file or the series."""


class TakenError(DataError):
    """A folder came to be in the place where one was to be put: another process made it meanwhile."""


class RunError(PPReIDError):
    """A run folder or checkpoint can't be used, or training met a value it must not go on from."""


class Stopped(Exception):
    """A run was asked to stop and saved its state; the commands exit with status 75 (EX_TEMPFAIL): to be continued."""


class LostError(Exception):
    """Another process of a run died or hangs; the commands print it as one line and exit with status 1: a crash, no
    mistake of the user's, and the run can go on from its last checkpoint."""


class MissingExtra(PPReIDError):
    """A feature needs an optional dependency that isn't installed."""

    def __init__(self, feature: str, extra: str):
        super().__init__(f"{feature} needs the extra '{extra}': pip install 'ppreid_dist[{extra}]'")
