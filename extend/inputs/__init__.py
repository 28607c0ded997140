"""Inputs: local directories, or repositories of the Hub at a commit, brought to this machine.

Everything that takes a model or adapter takes `PATH`, `ORG/NAME` or `ORG/NAME@REVISION`. A
repository is first pinned: asked for its commit and listing, so that what is wrong is told before
any work. Then the files that are needed come into the Hub's own cache, and stages read that
directory as any other. Records name the repository and the commit, never the cache.
"""

from extend.inputs.names import HubInput, as_hub_input, name_inputs, recorded_name
from extend.inputs.pin import Pinned, pin
from extend.inputs.resolve import local_path, takes_models

__all__ = ["HubInput", "Pinned", "as_hub_input", "local_path", "name_inputs", "pin",
           "recorded_name", "takes_models"]
