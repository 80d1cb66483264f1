"""Opens the training and validation data that a config names."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxpar.config import Config, ConfigError
from jaxpar.data import (
    BatchLoader,
    BatchOrder,
    DocumentCost,
    DocumentSource,
    PackedSource,
    build_dynamic_loader,
    build_loader,
    load_tokenizer,
    token_cache,
)
from jaxpar.data.text import corpus_files
from jaxpar.program import Program
from jaxpar.run.evaluation import EvalBatches, Evaluation, check_eval_batches, sample_batches, user_batches
from jaxpar.run.processes import decide_on_process_0, from_all_processes

Say = Callable[[str], None]  # is given a line for the user


def _quiet(line: str) -> None: ...


def open_training_data(program: Program, say: Say = _quiet) -> BatchLoader:
    """This process's rows of each global batch of `data.train_data_paths`. A collective call.

    Raises:
      ConfigError: as `open_tokens`.
    """
    config, folder = program.blueprint.config, open_tokens(program, "train_data_paths", say)
    num_epochs = config.runner.max_epochs if config.runner.max_epochs > 0 else None
    order = BatchOrder(config.actor.global_batch_size, config.data.seed, config.data.shuffle, num_epochs)
    workers = config.data.num_workers
    if config.runner.enable_dynamic_batch_size:
        documents, cost = DocumentSource(folder, config.row_length), DocumentCost(*program.blueprint.document_flops)
        loader = build_dynamic_loader(
            documents, order, dp=program.mesh.shape["dp"], ranks=program.dp_ranks, cost=cost, num_workers=workers
        )
    else:
        across = not config.data.reset_attention_mask
        samples = PackedSource.read(folder, config.runner.seq_length, across_documents=across)
        loader = build_loader(samples, order, rows=program.batch_layout.rows, num_workers=workers)
    loader.fingerprint = decide_on_process_0(lambda: fingerprint(config, folder))
    return loader


def fingerprint(config: Config, folder: Path) -> dict[str, Any]:
    """What the training data are, for a later run to compare.

    Args:
      folder: their token cache.

    Returns:
      files: their number, bytes and latest modification, and a checksum of all names, sizes and times.
      tokens: number of tokens and documents, and a checksum of all that the cache's index says of them.
      tokenizer: name and checksum.
    """
    index = json.loads((folder / "counts.json").read_text())
    del index["files"], index["checksum"]  # the same tokens may lie elsewhere
    files = [file.resolve() for path in config.data.train_data_paths for file in corpus_files(path)]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime) for file in files]
    latest = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(modified for _, _, modified in stats)))
    size = sum(size for _, size, _ in stats)
    tokenizer = load_tokenizer(config.actor.tokenizer.tokenizer_model)
    return {
        "files": f"{len(files)} files, {size:,} bytes, modified {latest}, {_checksum(stats)}",
        "tokens": f"{index['num_tokens']:,} tokens, {index['num_documents']:,} documents, {_checksum(index)}",
        "tokenizer": f"{Path(tokenizer.name).name} {_checksum(tokenizer.fingerprint)}",
    }


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def open_evaluation(program: Program, batches: EvalBatches | None = None, say: Say = _quiet) -> Evaluation | None:
    """The validation loss on these batches, or on `data.val_data_paths`; None if there are none. A collective call.

    Raises:
      ConfigError: as `open_tokens`, or the batches cannot be read again and again.
    """
    config, most = program.blueprint.config, program.blueprint.config.runner.limit_val_batches
    if batches is not None:
        check_eval_batches(program, batches)
        return Evaluation(program, lambda: user_batches(program, batches, most))
    if not config.data.val_data_paths or config.runner.val_check_interval <= 0:
        return None
    across = not config.data.reset_attention_mask
    folder = open_tokens(program, "val_data_paths", say)
    samples = PackedSource.read(folder, config.row_length, across_documents=across)
    return Evaluation(program, lambda: sample_batches(program, samples, most))


def open_tokens(program: Program, key: str, say: Say = _quiet) -> Path:
    """The folder with the tokens of the files in `data.<key>`. A collective call: each process checks a share of them.

    Raises:
      ConfigError: the tokenizer has more tokens than the model, the model takes more than tokens, or the data are wrong
        (`jaxpar.data.DataError`).
    """
    blueprint = program.blueprint
    if inputs := blueprint.inputs:
        argument = {"train_data_paths": "batches", "val_data_paths": "eval_batches"}[key]
        raise ConfigError(
            f"data.{key}: gives tokens, but the model or the objective also takes {', '.join(inputs)}: make batches yourself, "
            f"and call trainer.fit({argument}=…) or trainer.train_step(batch)"
        )
    config, tokenizer = blueprint.config, load_tokenizer(blueprint.config.actor.tokenizer.tokenizer_model)
    if tokenizer.vocab_size > blueprint.vocab_size:
        own = "vocab_size is" if blueprint.architecture else "head has logits for"
        more = "increase vocab_size" if blueprint.architecture else "give the embedding and the head more tokens"
        raise ConfigError(
            f"actor.tokenizer.tokenizer_model: {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model's {own} "
            f"{blueprint.vocab_size}: use the model's own tokenizer, or {more}"
        )
    return token_cache(
        getattr(config.data, key),
        setting=f"data.{key}",
        tokenizer=tokenizer,
        text_key=config.data.text_key,
        cache_dir=Path(config.runner.output_dir) / "token_cache",
        process=(jax.process_index(), jax.process_count()),
        gather=from_all_processes,
        say=say,
    )
