"""The last module that the server of `tests.spawn` loads: what is there by then is no garbage.

So no process that is forked from it looks through half a million objects again and again.
"""

import gc

gc.freeze()
