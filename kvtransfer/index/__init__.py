"""Where blocks are: which worker holds how much of a prompt. A hint by contract; the holder has the truth."""

from pdserve.kvtransfer.index.base import Holder, IndexUnavailable, Location, LocationIndex, Update

__all__ = ["Holder", "IndexUnavailable", "Location", "LocationIndex", "Update"]
