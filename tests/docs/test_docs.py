"""Every command, piece of Python, recipe, link, path and message in README, docs and notebooks."""

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest
import yaml
from docs_site import mathml
from docs_site.__main__ import listed, unlisted
from docs_site.expand import MARKER, expand
from docs_site.expand import commands as all_commands
from docs_site.notebook import notebook_page
from docs_site.tables import models_in
from markdown_it.token import Token

import extend
from extend.cli import main
from extend.options import STAGES
from extend.rope import METHODS
from tests.docs import commands, python_code, recipes
from tests.docs.pages import (
    RECORDS,
    ROOT,
    anchors,
    blocks,
    cells,
    code_in_lines,
    expanded,
    links,
    notebooks,
    pages,
    tokens,
    written_pages,
)

SHELLS = ("sh", "bash", "console")
PROSE = ("text", "")
OTHERS_OPTIONS = {
    "--cuda", "--disable-radix-cache", "--enable-lora", "--generation-config", "--lazy-unpickle",
    "--low-cpu-memory", "--master_addr", "--max-lora-rank", "--max-model-len", "--max-restarts",
    "--measured", "--multi_gpu", "--no-cache-prompt", "--no-enable-prefix-caching", "--no-requeue",
    "--num_processes", "--only", "--rdzv_conf", "--record", "--runs", "--save-module",
    "--sections", "--signal", "--sv-epsilon"}
ELSEWHERE = ("extend/tokens",)  # in the user's cache


def shell_lines():
    """(where, line) of everything that is a command."""
    for block in blocks():
        if block.language == "notebook":
            lines = [line[1:] for line in block.text.splitlines() if line.startswith("!")]
        elif block.language in SHELLS:
            lines = list(commands.command_lines(block.text))
        elif block.language == "":
            lines = [line for line in commands.command_lines(block.text)
                     if re.match(r"(extend|torchrun|accelerate launch|pip|python|scripts/\w+)( |$)",
                                 line)]
        else:
            continue
        yield from ((block.where, line) for line in lines)


def test_commands_parse():
    """Options exist, choices and lengths are right, nothing required is missing."""
    lines = list(shell_lines())
    wrong = [f"{where}: {line}\n    {found}" for where, line in lines
             for words in commands.simple_commands(line)
             if (found := commands.problem(words)) is not None]
    assert not wrong, "\n".join(wrong)
    told = " ".join(line for _, line in lines)
    for name in main.commands:
        assert f"extend {name} " in told, f"no page shows `extend {name}`"


@pytest.mark.parametrize(("line", "said"), [
    ("extend rescale m --to 64k --methd ntk --out o", "No such option"),
    ("extend rescale m --to 64kb --out o", "is not a length"),
    ("extend rescale m --to 64k", "Missing option"),
    ("extend extract --base a --tuned b --dtype fp32 --out o", "fp32"),
    ("extend extract --base a --tunde b ... --out o", "No such option"),
    ("extned run r --out o", "not a program"),
    ("extend rnu r --out o", "no such command"),
    ("torchrun --nproc_per_node 2 -m extend train r --uot o", "No such option"),
    ("HF_HUB_OFFLINE=1 extend run r 2>&1 | extend doctor", "Missing"),
    ("python scripts/get_text.py --no-such", "knows no option"),
    ('eval "$(extend no-such bash)"', "no such command"),
    ("scripts/no_such", "no such script"),
    ("pip install 'extend-context[nothing]'", "no such extra")])
def test_a_wrong_command_is_seen(line, said):
    found = [commands.problem(words) for words in commands.simple_commands(line)]
    assert any(said in problem for problem in found if problem)


def test_commands_in_running_text():
    wrong = [f"{where}: `{code}`: {found}" for page in written_pages()
             for where, code in code_in_lines(page) if code.startswith("extend ")
             if (found := commands.options_exist(code.split()[1:])) is not None]
    assert not wrong, "\n".join(wrong)
    assert commands.options_exist(["plan", "--gups", "N"]) is not None


def test_options_in_running_text():
    """A `--option` is one of extend's, or known to be another tool's."""
    own = {option for command in all_commands().values()
           for parameter in command.get_params(click.Context(command))
           for option in (*parameter.opts, *parameter.secondary_opts)}
    wrong = [f"{where}: `{code}`" for page in written_pages() for where, code in code_in_lines(page)
             if code.startswith("--") and re.split(r"[ =:]", code)[0] not in own | OTHERS_OPTIONS]
    assert not wrong, "\n".join(wrong)


def test_what_other_tools_have_is_called_as_here():
    """The right columns of docs/coming-from.md name keys, methods and parameters that exist."""
    ring = ast.parse((ROOT / "extend/ring/attention.py").read_text(encoding="utf-8"))
    known = {*recipe_keys(), *METHODS, "messages", "examples", "register_ring_attention",
             *(arg.arg for node in ring.body if getattr(node, "name", "") == "ring_attention"
               for arg in node.args.kwonlyargs)}
    column, seen = 0, 0
    for token in tokens(ROOT / "docs/coming-from.md"):
        if token.type in ("tr_open", "tr_close"):
            column = 0
        column += token.type == "td_open"
        for child in token.children or () if column == 2 else ():
            found = re.match(r"([a-z_0-9]+)(: |=|$)", child.content)
            if child.type == "code_inline" and found:
                seen += 1
                assert found[1] in known, f"coming-from: `{child.content}`"
    assert seen > 30


def recipe_keys() -> set[str]:
    def keys(model):
        for name, field in model.model_fields.items():
            yield name
            for inner in models_in(field.annotation):
                yield from keys(inner)

    return {key for model in STAGES.values() for key in keys(model)}


def test_extras_exist():
    for page in written_pages():
        named = re.findall(r"extend-context\[([\w,-]+)\]", page.read_text(encoding="utf-8"))
        assert commands.extras_problem(named) is None, page


def python_sources():
    for block in blocks():
        if block.language == "python":
            yield block.where, block.text
        elif block.language == "notebook":
            yield block.where, "\n".join(line for line in block.text.splitlines()
                                         if not line.startswith(("!", "%")))
        elif block.language == "" and "extend." in block.text:
            try:
                ast.parse(block.text)
            except SyntaxError:
                continue
            yield block.where, block.text


def test_python_is_right():
    sources = list(python_sources())
    wrong = [f"{where}: {found}" for where, source in sources
             for found in python_code.problems(source)]
    assert not wrong, "\n".join(wrong)
    assert any("extend.ring.ring_attention(" in source for _, source in sources)


@pytest.mark.parametrize("source", [
    "import extend\nextend.rescale('m', 'o', target_len=8, methd='ntk')",
    "import extend\nextend.merge('a', 't', 'o', wieght=1)",
    "import extend\nextend.mrege('a', 't', 'o')",
    "from extend.ring import ring_atention",
    "from extend.ring import shard\nshard(1, no_such=2)",
    "import extend\nextend.rope.METHOD['ntk']",
    "def f(:"])
def test_wrong_python_is_seen(source):
    assert list(python_code.problems(source))


def test_names_in_running_text():
    """`extend.a.b` in text is there."""
    for page in written_pages():
        for where, code in code_in_lines(page):
            found = re.match(r"(extend(\.\w+)+)(?=$|\(|\[|`)", code)
            if found:
                try:
                    python_code.resolve(found[1])
                except LookupError as error:
                    pytest.fail(f"{where}: {error}")


def test_recipes_load(tmp_path):
    found = [block for block in blocks() if block.language == "yaml"]
    wrong = [f"{block.where}: {said}" for block in found
             if (said := recipes.problem(block.text, block.marker, tmp_path)) is not None]
    assert not wrong, "\n".join(wrong)
    assert sum(not block.marker for block in found) >= 2


@pytest.mark.parametrize(("text", "marker", "said"), [
    ("stages: [{name: a, stage: rescale, model: m, to: 8k, methd: ntk}]", "", "unknown key"),
    ("- {name: a, stage: rescale, model: m, to: 8k, method: nkt}", "recipe: stages", "unknown"),
    ("lora_rnak: 8", "recipe: train", "unknown key"),
    ("a: [", "not ours: x", "not YAML")])
def test_a_wrong_recipe_is_seen(tmp_path, text, marker, said):
    assert said in recipes.problem(text, marker, tmp_path)


def test_every_block_says_what_it_is():
    known = {*SHELLS, *PROSE, "notebook", "python", "yaml", "json"}
    assert {block.language for block in blocks()} <= known


def test_links_lead_somewhere():
    wrong = []
    for page in pages():
        for link in links(page):
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
            elif anchor and target.suffix == ".md" and anchor not in anchors(expanded(target)):
                wrong.append(f"{page.relative_to(ROOT)}: {link}: no such heading")
            if ROOT / "docs" in page.parents and ROOT / "docs" not in target.parents:
                wrong.append(f"{page.relative_to(ROOT)}: {link}: not part of the site")
    assert not wrong, "\n".join(wrong)


def test_paths_in_text_exist():
    pattern = re.compile(r"(docs|scripts|recipes|tests|extend|assets)/[\w./-]+")
    for page in pages():
        for where, code in code_in_lines(page):
            if pattern.fullmatch(code) and RECORDS not in page.parents and code not in ELSEWHERE:
                assert (ROOT / code).exists(), f"{where}: {code}"


@cache
def sources() -> str:
    """The code with texts in one piece that are written in several."""
    text = "\n".join(path.read_text(encoding="utf-8")
                     for path in sorted((ROOT / "extend").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def is_said(message: str) -> bool:
    """Whether the code says each clause of a message, `...` standing for values."""
    def clause(text: str) -> bool:
        parts = [re.escape(part.strip()) for part in text.split("...")]
        return re.search(r"(?s:.{1,200}?)".join(parts), sources()) is not None

    return all(clause(text) for text in message.split("; ") if text)


def told_messages(page: Path):
    """The code that begins rows of tables whose first column is headed `what is said`."""
    parsed: tuple[Token, ...] = tokens(page)
    inside = False
    for place, token in enumerate(parsed):
        if token.type == "th_open":
            head = parsed[place + 1].content
            inside = head == "what is said" or (inside and parsed[place - 1].type != "tr_open")
        elif token.type == "tr_open" and inside and parsed[place + 1].type == "td_open":
            first = (parsed[place + 2].children or [token])[0]
            if first.type == "code_inline":
                yield first.content


def test_messages_are_those_of_the_code():
    told = [(page, message) for page in written_pages() for message in told_messages(page)]
    assert len(told) > 40
    wrong = [f"{page.relative_to(ROOT)}: {message}" for page, message in told
             if not is_said(message)]
    assert not wrong, "\n".join(wrong)
    assert not is_said("the model is stretched already")


def test_what_is_generated_is_whole():
    """Markers name what there is; the reference has every command, stage and function."""
    texts = {page: expanded(page) for page in written_pages()}
    assert not [page for page, text in texts.items() if MARKER.search(text)]
    reference = ROOT / "docs/reference"
    for name in all_commands():
        assert f"## extend {name}\n" in texts[reference / "commands.md"]
    for name, model in STAGES.items():
        assert f"## {name}\n" in texts[reference / "recipe.md"]
        for key in model.model_fields:
            assert f"| `{key}` |" in texts[reference / "recipe.md"]
    for name in extend._STAGES:
        assert f"heading: extend.{name}," in texts[reference / "api.md"]
    with pytest.raises(KeyError):
        expand("<!-- generated: command no-such -->")


def test_formulas_are_found(monkeypatch):
    monkeypatch.setattr(mathml, "_convert", lambda latex, display: f"[{display}: {latex}]")
    text = "a $x^2$ and `$PATH` cost $5\n\n$$y\n= z$$\n\n    echo $HOME $HOME\n"
    made = mathml.with_mathml(text)
    assert "<span>[inline: x^2]</span>" in made
    assert '<div class="formula">[block: y\n= z]</div>' in made
    assert "`$PATH` cost $5" in made and "echo $HOME $HOME" in made
    for page in written_pages():
        left = re.sub(r"```.*?```|`[^`]*`|^    .*$", "", mathml.with_mathml(
            page.read_text(encoding="utf-8")), flags=re.DOTALL | re.MULTILINE)
        assert "$" not in left or "$EXTEND" in left, page


def test_the_navigation_names_pages_once():
    """Those it does not name come at its end by themselves."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(listed(config["nav"]))
    own = {page.relative_to(ROOT / "docs").as_posix() for page in written_pages()
           if ROOT / "docs" in page.parents}
    made = {notebook.with_suffix(".md").name for notebook in notebooks()}
    assert len(set(named)) == len(named)
    assert set(named) <= own | made
    assert unlisted([{"Home": "index.md"}], ROOT / "docs") == sorted(own - {"index.md"})


def test_notebooks_hold_what_a_run_printed(tmp_path):
    for notebook in notebooks():
        code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell["outputs"]]
        assert outputs and all(output["output_type"] != "error" for output in outputs)
        page = notebook_page(notebook, tmp_path / "pictures")
        assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work)\b", page)
        assert list((tmp_path / "pictures").glob("*.png"))
