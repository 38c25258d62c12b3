"""Verbs around training: train, compare and plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from diablo_cli.completion import complete_methods, complete_optimizers, complete_recipe
from diablo_cli.output import answer, out, progress
from diablo_cli.shell import app, check_model, is_recipe, quiet, refuse

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's.")
]


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file, or the name of a shipped recipe such as quickstart.", autocompletion=complete_recipe
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, on which tokens, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an unfinished run in the output folder.")
    ] = False,
) -> None:
    """Train a model as a recipe says: check, train, save and score."""
    from diablo.recipes.reading import load_recipe

    settings = load_recipe(recipe, overrides or [])
    quiet()
    if dry_run:
        from diablo.planning.materials import gather

        materials = gather(settings)
        # What can be refused without torch has been.
        from diablo.planning.making import make_plan
        from diablo.planning.sizes import run_memory
        from diablo.publishing.hub import check_upload
        from diablo_cli.reporting import print_plan

        check_upload(settings.push_to_hub)
        plan_of_run = make_plan(settings, materials=materials)
        memory = run_memory(plan_of_run)
        print_plan(out, plan_of_run, memory)
        answer({**plan_of_run.record(), "memory": memory and memory.record()})
        return
    from diablo.training import train as run
    from diablo_cli.reporting import print_result

    result = run(settings, console=progress, resume=resume, overwrite=overwrite)
    # With several processes the record is the main one's.
    if result.record:
        print_result(out, result)
        answer(result.paths() | result.record)
    if result.upload_fault is not None:
        push = settings.push_to_hub
        assert push is not None
        options = " --private" * push.private + (f" --base {push.base}" if push.base else "")
        for line in (
            f"error: {result.upload_fault}",
            f"The run itself is whole. Upload it with: diablo push {settings.output} {push.repo}{options}",
        ):
            print(line, file=sys.stderr)
        sys.exit(1)


@app.command()
def compare(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file or the name of a shipped recipe, with DiaBlo as method.", autocompletion=complete_recipe
        ),
    ],
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names of methods, separated by commas; all that have a name if not given. Any type of PEFT is "
            "peft:TYPE:KEY, such as peft:GRALORA:r, where KEY is chosen for equal parameters.",
            autocompletion=complete_methods,
        ),
    ] = None,
    optimizers: Annotated[
        str | None,
        typer.Option(
            help="Names of optimizers, separated by commas: every method is run with each of them; the recipe's own "
            "if not given.",
            autocompletion=complete_optimizers,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds; the first is the recipe's.")] = 3,
    rate_seeds: Annotated[
        int, typer.Option(help="With how many of the seeds each learning rate is tried; the best mean is taken.")
    ] = 1,
    lrs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[METHOD=]RATES",
            help="Learning rates to try, separated by commas; 2e-4,5e-4,1e-3,2e-3 if not given, and a tenth of them "
            "for full. METHOD= gives a method rates of its own; may be given several times.",
        ),
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file to measure forgetting on, in place of the builtin text.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs go on at once, on GPUs or on the CPU.")] = 1,
    folder: Annotated[Path | None, typer.Option("--out", help="A folder to write to, or to go on in.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run and stop.")] = False,
) -> None:
    """Compare methods at equal trained parameters, each at its best learning rate, over several seeds."""
    from diablo.recipes.reading import load_recipe

    settings = load_recipe(recipe, [*(overrides or []), *([f"evaluation.general={general}"] if general else [])])
    from diablo.comparison import DEFAULT_METHODS, parse_rates, plan_comparison
    from diablo.comparison import compare as run
    from diablo_cli.reporting import print_comparison, print_comparison_plan

    rates, own_rates = parse_rates(lrs or [])
    names = DEFAULT_METHODS if methods is None else methods.split(",")
    quiet()
    comparison = plan_comparison(
        settings,
        methods=names,
        optimizers=None if optimizers is None else optimizers.split(","),
        seeds=seeds,
        rate_seeds=rate_seeds,
        rates=rates,
        own_rates=own_rates,
        folder=folder,
    )
    print_comparison_plan(out, comparison)
    if dry_run:
        answer(comparison.record())
        return
    record = run(comparison, console=progress, jobs=jobs)
    print_comparison(out, record, comparison.folder)
    answer({"folder": comparison.folder, **record})
    if any(each["failure"] for each in record["runs"]):
        sys.exit(1)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, as for train; or a model: a folder, a hub id or builtin:NAME, whose config alone is read.",
        ),
    ],
    overrides: Overrides = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="N: 1/N of each target is trained; 64 if neither this nor --budget is given."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="The largest share of the model to train, such as 1%, in place of --num-blocks.")
    ] = None,
    target_modules: Annotated[str | None, typer.Option(help="Names, separated by commas, or all-linear.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a batch; 1 if not given.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; 1024 if not given.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The frozen weights' dtype: bf16, fp16 or fp32; bf16 if not given.")
    ] = None,
    gradient_checkpointing: Annotated[
        str | None, typer.Option(help="none, selective or full: what the backward computes again; none if not given.")
    ] = None,
) -> None:
    """Show what would be trained and what memory it would take, before anything is downloaded."""
    from diablo.errors import UserError
    from diablo.models.choices import check_checkpointing, check_dtype
    from diablo.recipes.reading import load_recipe

    options = {
        "--num-blocks": num_blocks,
        "--budget": budget,
        "--target-modules": target_modules,
        "--batch-size": batch_size,
        "--length": length,
        "--dtype": dtype,
        "--gradient-checkpointing": gradient_checkpointing,
    }
    if is_recipe(model):
        refuse("a recipe has settings of its own, such as method.num_blocks=64 or training.batch_size=1", options)
        recipe = load_recipe(model, overrides or [])
        quiet()
        from diablo.planning.sizes import recipe_sizes
        from diablo_cli.reporting import print_sizes

        training = recipe.training
        sizes = recipe_sizes(recipe)
        dtype = str(sizes.dtype).removeprefix("torch.")
        if recipe.quantization:
            dtype += f" over {recipe.quantization} weights"
        why = "training.max_length" if sizes.length == training.max_length else "as many as the model reads"
        print_sizes(
            out,
            sizes,
            recipe.model,
            f"{training.batch_size} x {sizes.length} tokens ({why}) in {dtype}, "
            f"gradient checkpointing: {training.gradient_checkpointing}",
        )
        out.print("The rows were not read. Where they are shorter, diablo train --dry-run says what they take.")
        answer(
            {
                "model": recipe.model,
                **sizes.record(),
                "quantization": recipe.quantization,
                "batch_size": training.batch_size,
                "length": sizes.length,
                "gradient_checkpointing": training.gradient_checkpointing,
            }
        )
        return
    if overrides:
        raise UserError(
            f"{overrides[0]}: overrides are of a recipe, and {model!r} is none; use options, such as --num-blocks."
        )
    check_model(model)
    share = None
    if budget is not None:
        try:
            share = float(budget.removesuffix("%")) / (100 if budget.endswith("%") else 1)
        except ValueError:
            raise UserError(f"--budget: found {budget!r}; give a share such as 1% or 0.01.") from None
    names = target_modules.split(",") if target_modules and target_modules != "all-linear" else target_modules
    batch_size, length, dtype = batch_size or 1, length or 1024, dtype or "bf16"
    checkpointing = gradient_checkpointing or "none"
    check_dtype(dtype)
    check_checkpointing(checkpointing)
    quiet()
    from diablo.devices import parse_dtype
    from diablo.planning.sizes import plan_sizes
    from diablo_cli.reporting import print_sizes

    sizes = plan_sizes(
        model,
        num_blocks=num_blocks,
        budget=share,
        target_modules=names,
        batch_size=batch_size,
        length=length,
        dtype=parse_dtype(dtype),
        checkpointing=checkpointing,
    )
    batch = f"{batch_size} x {length} tokens in {dtype}, gradient checkpointing: {checkpointing}"
    print_sizes(out, sizes, model, batch)
    answer(
        {
            "model": model,
            **sizes.record(),
            "quantization": None,
            "batch_size": batch_size,
            "length": length,
            "gradient_checkpointing": checkpointing,
        }
    )
