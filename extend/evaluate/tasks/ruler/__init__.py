"""RULER: thirteen tasks, six of which need no files.

To evaluate all six, name each of RULER6; the other seven read the user's files.
"""

from extend.evaluate.tasks.ruler.niah import (
    NiahMultikey1,
    NiahMultikey2,
    NiahMultikey3,
    NiahMultiquery,
    NiahMultivalue,
    NiahSingle1,
    NiahSingle2,
    NiahSingle3,
)
from extend.evaluate.tasks.ruler.qa import Hotpot, Squad
from extend.evaluate.tasks.ruler.task import Ruler
from extend.evaluate.tasks.ruler.variable_tracking import VariableTracking
from extend.evaluate.tasks.ruler.word_counts import CommonWords, FrequentWords

RULER6: dict[str, type[Ruler]] = {kind.name: kind for kind in (
    NiahSingle1, NiahMultikey2, NiahMultikey3, VariableTracking, CommonWords, FrequentWords)}
RULER13: dict[str, type[Ruler]] = {kind.name: kind for kind in (
    NiahSingle1, NiahSingle2, NiahSingle3, NiahMultikey1, NiahMultikey2, NiahMultikey3,
    NiahMultivalue, NiahMultiquery, VariableTracking, CommonWords, FrequentWords, Squad, Hotpot)}
