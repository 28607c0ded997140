"""Windows of long text: of all documents joined, or each of one document."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from extend.documents import read_documents
from extend.errors import DataError
from extend.evaluate.frame import Frame


@dataclass(kw_only=True)
class OfText:
    """What tasks on windows of text have in common.

    Args:
        text: file or folder of text (see `extend.documents`) that the model was not trained on;
            tokenised once a run.
        column: key of a JSON line, or column of a parquet file, that holds the text.
    """

    text: str
    column: str = "text"
    _documents: Any = field(default=None, init=False, repr=False)  # list of int32 [tokens]

    def inputs(self) -> dict[str, str]:
        return {"text": self.text}

    def cut(self, frame: Frame, window: int, count: int, *, join: bool = True) -> list[list[int]]:
        """Cut windows that do not overlap, at equal distances, so that all text has its share.

        Args:
            window: tokens, the special tokens at its start included.
            count: at most so many windows.
            join: whether a window may hold the end of one document and the start of the next.

        Raises:
            DataError: the text, or without `join` its longest document, is shorter than that.
        """
        import numpy as np

        prefix = list(frame.prefix)
        body = window - len(prefix)
        documents = self._read(frame.tokenizer)
        pieces = [np.concatenate(documents)] if join else documents
        places = [(piece, k * body) for piece in pieces for k in range(len(piece) // body)]
        if not places:
            raise DataError(self._too_short(pieces, window, join))
        count = min(count, len(places))
        chosen = (places[k * len(places) // count] for k in range(count))
        return [prefix + piece[start:start + body].tolist() for piece, start in chosen]

    def _read(self, tokenizer: Any) -> Sequence[Any]:
        if self._documents is None:
            import numpy as np

            self._documents = [
                np.asarray(tokenizer(text.rstrip() + "\n", add_special_tokens=False,
                                     verbose=False)["input_ids"], dtype=np.int32)
                for text in read_documents(self.text, column=self.column)]
            if not self._documents:
                raise DataError(f"{self.text}: holds no documents")
        return self._documents

    def _too_short(self, pieces: Sequence[Any], window: int, join: bool) -> str:
        longest = max(map(len, pieces))
        if join:
            return (f"{self.text}: has {longest} tokens, too few for one window of {window}; give "
                    "more text or a shorter window")
        return (f"{self.text}: the longest of its {len(pieces)} documents has {longest} tokens, "
                f"too few for one window of {window}; give longer documents, a shorter window, or "
                "join: true")
