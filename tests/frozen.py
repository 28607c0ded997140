"""The last module that the server of `tests.spawn` loads: of what is there by then nothing is garbage.

So no process that is forked from it looks through half a million objects again and again.
"""

import gc

gc.freeze()
