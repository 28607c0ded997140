"""`import`: a GGUF file as a checkpoint that the other stages take."""

import click

from extend.cli.group import main, out_option, overwrite_option, reporting


@main.command("import")
@click.argument("file", metavar="FILE|REPO:FILE")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32", "float16"]), default="bfloat16",
              show_default=True, help="Dtype of the written weights.")
@click.option("--tokenizer", metavar="MODEL", default=None,
              help="Take the tokenizer of this model, not that of the file.")
@out_option
@overwrite_option
@reporting
def import_(file, dtype, tokenizer, out, overwrite):
    """Dequantize a GGUF file to a safetensors checkpoint with config and tokenizer.

    Of a model in parts, name the first. Needs `pip install 'extend-context[gguf]'`.

    \b
    extend import ./SmolLM2-135M-Instruct.Q4_1.gguf --out ./smollm2
    extend import org/model-GGUF:model-Q8_0.gguf --dtype float32 --out ./model
    extend import org/model-GGUF@v1:model-00001-of-00003.gguf --tokenizer org/model --out ./model
    """
    from extend.gguf import import_gguf

    path = import_gguf(file, out, dtype=dtype, tokenizer=tokenizer, overwrite=overwrite)
    return {"output": str(path)}
