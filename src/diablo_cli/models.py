"""Verbs that make something of a model or an adapter, or talk to it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from diablo_cli.output import answer, out, progress
from diablo_cli.shell import Base, app, check_file, check_model, check_writes, quiet, refuse


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or builtin:NAME.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the quantized model.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4, 3 or 2.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 128, 64, 32 or 16.")] = 64,
    method: Annotated[str, typer.Option(help="magr-gptq, gptq or rtn.")] = "magr-gptq",
    calibration: Annotated[
        str, typer.Option(help="A .txt or .jsonl file, a task's name, or builtin: text like that the model will see.")
    ] = "builtin",
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of the tasks' datasets, in place of the hub.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of calibration text, at most.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the calibration text.")] = 0,
    alpha: Annotated[float | None, typer.Option(help="Weight of MagR's penalty; 1e-4 if not given.")] = None,
) -> None:
    """Quantize a model to 4, 3 or 2 bits, to train adapters over; goes on where it was interrupted."""
    from diablo.models.folders import check_new_folder
    from diablo.quantization import Scheme, calibration_rows, check_calibration

    check_model(model)
    check_new_folder(folder, "quantized model")
    check_calibration(calibration, data_folder)
    scheme = Scheme(bits, group_size, method, **({} if alpha is None else {"alpha": alpha}))
    quiet()
    from diablo.models.loading import load_tokenizer, resolve_model
    from diablo.quantization.model import quantize_model

    tokenizer = load_tokenizer(resolve_model(model))
    tokens = calibration_rows(calibration, tokenizer, rows=rows, length=length, seed=seed, folder=data_folder)
    report = quantize_model(model, folder, scheme, tokens, console=progress)
    errors = report.errors
    worst = max(errors, key=errors.__getitem__)
    out.print(
        f"Wrote {escape(str(report.folder))}: {len(errors)} layers in {bits} bits ({method}), "
        f"{report.bytes_before / 1e6:,.1f} MB -> {report.bytes_after / 1e6:,.1f} MB. On {tokens.numel():,} tokens of "
        f"{escape(calibration)} the layers' outputs differ by {sum(errors.values()) / len(errors):.1%} on average, "
        f"most by {errors[worst]:.1%} in {worst}."
    )
    answer({**asdict(report), **asdict(scheme), "calibration": calibration, "calibration_tokens": tokens.numel()})


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or the run's.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the merged model.")],
    base: Base = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; the base model's if not given.")] = None,
    into: Annotated[
        str | None,
        typer.Option(help="What to merge into, if the base was quantized: stored, dequantized or requantized weights."),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="For --into requantized: a .txt or .jsonl file, a task's name, or builtin.")
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="A folder of the tasks' datasets, in place of the hub.")
    ] = None,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Merge also into other weights than the adapter was trained on.")
    ] = False,
) -> None:
    """Merge an adapter into its base model: a plain model that any engine serves."""
    from diablo.models.choices import check_dtype
    from diablo.models.folders import adapter_folder, check_new_folder
    from diablo.quantization import calibration_rows, check_calibration

    if dtype is not None:
        check_dtype(dtype)
    source = adapter_folder(adapter)
    check_model(base, "--base")
    check_new_folder(folder, "merged model")
    if calibration is None:
        refuse("it is read by --calibration, which is missing", {"--data-folder": data_folder})
    else:
        check_calibration(calibration, data_folder)
    quiet()
    from diablo.devices import parse_dtype
    from diablo.merging import merge_adapter
    from diablo.tuner.base_digest import CANNOT_BE_TOLD

    chosen = parse_dtype(dtype) if dtype else None
    rows = partial(calibration_rows, calibration, folder=data_folder) if calibration else None
    report = merge_adapter(
        source, folder, base=base, dtype=chosen, into=into, calibration=rows, other_base=other_base, console=progress
    )
    out.print(f"Wrote {escape(str(report.folder))} in {str(report.dtype).removeprefix('torch.')}.")
    if report.is_same_base is not True:
        told = "The base model has other weights than the one that the adapter was trained on"
        out.print(f"{CANNOT_BE_TOLD if report.is_same_base is None else told}.")
    if report.verified is not None:
        out.print(
            f"Read back {report.verified} tensors: each is the base model's, plus the blocks on its diagonal"
            f"{' and the rows of the tokens' if report.tokens else ''}, to the bit."
        )
    for name, shared in report.untied.items():
        out.print(
            f"Untied {escape(name)} from {escape(shared)}: they are one weight in the base model, which the adapter "
            "changes. The merged model has both, and its config says tie_word_embeddings: false."
        )
    if report.logits is not None:
        difference, largest = report.logits
        out.print(
            f"Its logits differ from the adapted model's by at most {difference:.1e} (largest logit {largest:.1f})."
        )
    else:
        out.print("Logits were not compared: the model does not fit into the memory that is free.")
    if report.losses is not None:
        before, after = report.losses
        out.print(
            f"Loss per token on {report.measured_on}: {before:.4f} -> {after:.4f} by merging into {into} weights "
            f"({after - before:+.4f})."
        )
    answer({**report.record(), "into": into})


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or the run's.")],
    other: Annotated[str | None, typer.Argument(help="A second adapter, shown beside the first.")] = None,
    base: Base = None,
    plot: Annotated[Path | None, typer.Option(help="Draw every block's norm by layer and module as a PNG.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="A file for every block's figures (JSON).")] = None,
) -> None:
    """Show where an adapter's update goes: how large it is beside the base weights, by layer and module."""
    from diablo.models.folders import adapter_folder

    check_file(plot, "--plot")
    check_file(out_file)
    given = [adapter_folder(each) for each in (adapter, other) if each is not None]
    check_model(base, "--base")
    quiet()
    from diablo.models.inspection import inspect_adapter, inspection_record, plot_inspections
    from diablo.records.results import write_json
    from diablo_cli.reporting import print_inspections

    inspections = [inspect_adapter(each, base=base, label=label) for label, each in zip("AB", given, strict=False)]
    print_inspections(out, inspections)
    if plot is not None:
        plot_inspections(plot, inspections)
        out.print(f"Wrote {escape(str(plot))}.")
    record = {"adapters": [inspection_record(each) for each in inspections]}
    if out_file is not None:
        write_json(out_file, record)
        out.print(f"Wrote {escape(str(out_file))}.")
    answer(record)


@app.command("to-lora")
def to_lora(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or the run's.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the LoRA adapter.")],
    rank: Annotated[str, typer.Option(help="LoRA's rank, or a share of the update to keep, such as 0.99.")],
    base: Base = None,
) -> None:
    """Turn an adapter into a LoRA adapter, for engines that serve LoRA alone, and say what that loses."""
    from diablo.errors import UserError
    from diablo.models.folders import adapter_folder, check_new_folder

    try:
        chosen = float(rank) if "." in rank else int(rank)
    except ValueError:
        raise UserError(f"--rank: found {rank!r}; give an integer, or a share above 0 and up to 1.0.") from None
    check_writes(adapter, "to-lora")
    source = adapter_folder(adapter)
    check_model(base, "--base")
    check_new_folder(folder, "LoRA adapter")
    quiet()
    from diablo.models.adapters import write_as_lora

    report = write_as_lora(source, folder, chosen, base=base)
    ranks = sorted(set(report.ranks.values()))
    rank_range = " to ".join(map(str, ranks[:1] + ranks[1:][-1:]))
    worst = max(report.relative_errors, key=report.relative_errors.__getitem__)
    out.print(
        f"Wrote {escape(str(folder))}: LoRA of rank {rank_range} on {len(report.ranks)} modules, "
        f"{sum(tensor.numel() for tensor in report.state_dict.values()):,} parameters. The update differs by "
        f"{report.relative_error:.1%} (Frobenius norm), most by {report.relative_errors[worst]:.1%} in {worst}."
    )
    answer({"folder": folder, **report.record()})


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' adapter.chkpt.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the adapter.")],
    base: Annotated[str, typer.Option(help="The model it was trained on: a folder, a hub id or builtin:NAME.")],
) -> None:
    """Turn a checkpoint of the paper's authors into a PEFT adapter."""
    from diablo.errors import UserError
    from diablo.models.folders import check_new_folder

    if not checkpoint.is_file():
        raise UserError(f"There is no file {str(checkpoint)!r}; give the adapter.chkpt of the paper's authors.")
    check_model(base, "--base")
    check_new_folder(folder, "adapter")
    quiet()
    from diablo.models.authors import import_checkpoint

    report = import_checkpoint(checkpoint, folder, base=base)
    out.print(
        f"Wrote {escape(str(report.folder))}: {report.modules} modules, {report.parameters:,} parameters, "
        f"num_blocks={report.num_blocks}. Try: diablo generate {escape(str(report.folder))} 'How are you?'"
    )
    answer(asdict(report))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="An image before the prompt; may be given several times.")
    ] = None,
) -> None:
    """Complete a prompt with a model or an adapter."""
    from diablo.data.reading.images import question_about

    row = question_about(prompt, image or ())
    if image and chat is False:
        refuse("images stand in a chat template, which --no-chat leaves out", {"--image": image})
    check_writes(model, "generate")
    check_model(model)
    check_model(base, "--base")
    quiet()
    import transformers

    from diablo.models.ready import load_for_generation
    from diablo.scoring.generation import complete_row

    loaded, encoder = load_for_generation(model, base=base, chat=True if image else chat, with_images=bool(image))
    transformers.set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    asked = encoder.encode_prompt(row)
    text = complete_row(loaded, encoder, asked, max_new_tokens=max_new_tokens, **sampling).text
    out.print(text.strip(), markup=False)
    answer({"model": model, "prompt": prompt, "text": text.strip()})


@app.command(no_record="a conversation is no one record; use diablo generate --json, or /save in the chat")
def chat(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or any model.")],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    use_template: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Use the tokenizer's chat template; if not given, as the run did, or if there is one.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a model or an adapter; /base shows the base model's answer beside it."""
    check_writes(model, "chat")
    check_model(model)
    check_model(base, "--base")
    quiet()
    from diablo.data import RowEncoder
    from diablo.models.ready import load_for_generation
    from diablo.records.results import recipe_of_run
    from diablo_cli.chat import Chat, read_line

    loaded, encoder = load_for_generation(model, base=base, chat=use_template)
    if use_template is None and not recipe_of_run(model):
        has_template = bool(encoder.tokenizer.chat_template)
        encoder = RowEncoder(encoder.tokenizer, chat=has_template, stop_token_ids=encoder.stop_token_ids)
    conversation = Chat(
        loaded,
        encoder,
        out,
        # A script reads the answers alone.
        notes=None if sys.stdin.isatty() else progress,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    conversation.run(lambda: read_line(out))
