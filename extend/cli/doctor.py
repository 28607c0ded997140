"""`extend doctor`: would every engine read this checkpoint alike?"""

from collections.abc import Iterable

import click

from extend.cli.group import main, overwrite_option, reporting
from extend.cli.types import LENGTH, Choice, ListType


def _readers() -> Iterable[str]:
    from extend.doctor.readers import READERS

    return READERS


@main.command()
@click.argument("directory", metavar="DIR")
@click.option("--fix", is_flag=True, help="Write the form that all readers agree on.")
@click.option("--out", default=None, metavar="DIR2",
              help="Directory for --fix; without it, DIR is changed and its files are kept as "
                   "*.before-doctor.")
@overwrite_option
@click.option("--readers", type=ListType(names=_readers), default=None,
              help="Compare these engines only, names separated by commas.")
@click.option("--theta", type=float, default=None, help="The theta that is right.")
@click.option("--max-length", type=LENGTH, default=None, help="The maximum length that is right.")
@click.option("--original-length", type=LENGTH, default=None, help="The native length.")
@click.option("--rope-type", default=None, help="The rope_type that is right.")
@click.option("--keep", type=Choice(["rope_scaling", "rope_parameters"]), default=None,
              help="Which of the two is right.")
@reporting
def doctor(directory, fix, out, overwrite, readers, theta, max_length, original_length, rope_type,
           keep):
    """Read DIR as transformers 4 and 5, vLLM, SGLang and llama.cpp do, and compare.

    Exits with 1 where engines would compute different things from it, and says which keys cause it
    and what to change. Of a LoRA adapter it also says whether vLLM and SGLang would serve it.

    \b
    extend doctor ./llama-128k
    extend doctor ./llama-128k --fix --out ./llama-128k-portable
    extend doctor ./adapter --fix --out ./adapter-servable
    extend doctor ./llama-128k --readers transformers-5,vllm --json
    """
    from extend.doctor import doctor as examine

    diagnosis = examine(directory, fix=fix, out=out, overwrite=overwrite, readers=readers,
                        theta=theta, max_length=max_length, original_length=original_length,
                        rope_type=rope_type, keep=keep)
    return diagnosis.to_json(), diagnosis.to_text(), diagnosis.complaint
