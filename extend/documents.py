"""Read documents of plain text, JSON lines or parquet from a file or a folder."""

from collections.abc import Iterator
from pathlib import Path

from extend.errors import DataError
from extend.untrusted import parse_json

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def list_files(path: Path | str) -> list[Path]:
    """Every readable file of `path`, sorted by name so that all machines agree on the order.

    Raises:
        DataError: `path` is missing or holds no file of a known kind.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    if not files:
        state = "holds no text" if path.is_dir() else "no such file or directory"
        raise DataError(f"{path}: {state}; give a file or a folder of {', '.join(SUFFIXES)}")
    return files


def read_documents(path: Path | str, *, column: str = "text") -> Iterator[str]:
    """Yield the documents of a file or folder in a fixed order.

    A text file is one document; a JSON line or a parquet row is one, its text under `column`.

    Raises:
        DataError: a file that is not UTF-8 or not JSON, or a row without the column.
    """
    for file in list_files(path):
        if file.suffix in TEXT_SUFFIXES:
            yield _read_text(file)
        elif file.suffix == ".jsonl":
            yield from (_field(row, column, where) for where, row in read_json_lines(file))
        else:
            yield from _read_parquet(file, column)


def read_json_lines(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield (`file:line`, object) of each non-empty line, holding one line at a time."""
    for number, line in enumerate(_read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: a JSON {type(row).__name__}, not an object")
        yield f"{file}:{number}", row


def _read_lines(file: Path) -> Iterator[str]:
    """The lines of a file; what else some take for the end of a line may stand in JSON as it is."""
    begin = 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                yield line.decode("utf-8")
                begin += len(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {begin + error.start}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _field(row: dict, column: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        raise DataError(f"{where}: no text under {column!r}; it has {', '.join(map(str, row))}")
    return row[column]


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{file}: reading parquet needs pyarrow; pip install "
                        "'extend-context[parquet]'") from None
    table = parquet.ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise DataError(f"{file}: no column {column!r}; it has "
                        f"{', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(columns=[column]):
        for number, text in enumerate(batch.column(0).to_pylist()):
            yield _field({column: text}, column, f"{file} row {number}")
