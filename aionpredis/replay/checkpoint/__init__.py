"""A run of a replay as a folder of standard files, and back.

::

    folder/
    ├── replay.json                     name, run, columns, counts, the files below
    ├── transitions-00000.safetensors   ~64 MB of whole chunks, one behind the other, in the order of the log
    ├── …
    ├── policy.safetensors              the newest weights; their version stands in ``__metadata__``
    └── <name>.safetensors              whatever else was saved with them

In a bundle of transitions each column is ``(transitions, *shape)``. What the log knows stands beside them, under names
that no column can have: ``log.incarnation`` ``(chunks, 8)`` uint8, ``log.seq`` and ``log.rows`` ``(chunks,)`` int64, and
``log.episode_end`` ``(transitions,)`` bool. So a restored run has the same chunks, and the same trajectories. Its incarnations
are others, as many: an actor that wrote some of it and lives goes on beside them.

A folder has its name only when it is whole. At most two bundles are in memory, one that travels and one on its way to or
from the disk, which is a worker thread's business.

``files`` on the disk · ``transfer`` of bundles, and its progress · ``saving`` · ``restoring``.
"""

from aionpredis.replay.checkpoint.files import Extra, load_extra, saved_facts
from aionpredis.replay.checkpoint.restoring import Saved, look_through, restore_any
from aionpredis.replay.checkpoint.saving import save, save_any
from aionpredis.replay.checkpoint.transfer import Progress

__all__ = ["Extra", "Progress", "Saved", "load_extra", "look_through", "restore_any", "save", "save_any", "saved_facts"]
