"""Tokens that tests make are kept in a directory of their own, not in the user's cache."""

import atexit
import os
import shutil
import tempfile

from tests.hub import hub, hub_server  # noqa: F401  (fixtures)

if "EXTEND_CACHE" not in os.environ:  # set before processes are forked, which inherit it
    os.environ["EXTEND_CACHE"] = tempfile.mkdtemp(prefix="extend-test-cache-")
    atexit.register(shutil.rmtree, os.environ["EXTEND_CACHE"], ignore_errors=True)
