"""Every entry point, by name, in the order of MLproject."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.stages import (
    cache,
    evaluate,
    export,
    fetch,
    init,
    log,
    main,
    promote,
    quantize,
    register,
    reproduce,
    score,
    search,
    serve,
    train,
    verify,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.pipeline.command import Command

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        main.COMMAND,
        init.COMMAND,
        cache.COMMAND,
        score.COMMAND,
        fetch.STEP,
        train.STEP,
        search.STEP,
        quantize.STEP,
        export.STEP,
        log.STEP,
        register.STEP,
        evaluate.STEP,
        promote.STEP,
        reproduce.STEP,
        verify.COMMAND,
        serve.COMMAND,
    )
}
