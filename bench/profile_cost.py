"""What does a profile cost? `python bench/profile_cost.py DIR [--quantize int4]`.

One pass of `moe-experts profile` over documents of random tokens against a plain prefill of the same tokens
in the same batches, in turn.
"""

import argparse
import random
import time
from pathlib import Path

from common import machine, save, summary  # type: ignore[import-not-found]

from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.engine_load import load_parts
from moe_runtime.experts.corpus import Corpus, Text
from moe_runtime.experts.corpus_text import Rendered
from moe_runtime.experts.packing import cache_blocks, pack
from moe_runtime.experts.profile import Profiler
from moe_runtime.experts.progress import Progress
from moe_runtime.layers.decoder import Decoder


def prefill(model: Decoder, corpus: Corpus, config: EngineConfig) -> float:
    """Seconds of reading every document once."""
    documents = [text.token_ids for text in corpus.texts]
    blocks = cache_blocks([len(ids) for ids in documents], config.max_batch_tokens, config.block_size)
    cache = model.new_cache(blocks, config.block_size, config.kv_dtype)
    start = time.perf_counter()
    for step in pack(documents, config.max_batch_tokens, config.block_size):
        model.forward(Batch.build(step, config.block_size), cache)
    return time.perf_counter() - start


def profile(profiler: Profiler, corpus: Corpus) -> float:
    """Seconds of its pass over all documents."""
    start = time.perf_counter()
    with Progress("profile", corpus.num_tokens) as progress:
        profiler.run(corpus, progress)
    return time.perf_counter() - start


def main() -> None:
    """Load, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--packed-dir", type=Path)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a document")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = EngineConfig(quantize=arguments.quantize, packed_dir=arguments.packed_dir)
    model = load_parts(arguments.model, config, None, None).model
    rng, vocabulary = random.Random(0), model.config.vocab_size
    texts = [
        Text(str(number), Rendered(tuple(rng.randrange(vocabulary) for _ in range(arguments.tokens))))
        for number in range(arguments.documents)
    ]
    corpus, profiler = Corpus("random tokens", tuple(texts)), Profiler(model, config)
    rounds = [
        (prefill(model, corpus, config), profile(profiler, corpus)) for _ in range(arguments.rounds + 1)
    ][1:]
    result = {
        "machine": machine(),
        "tokens": corpus.num_tokens,
        "prefill_s": summary([plain for plain, _ in rounds]),
        "profile_s": summary([watched for _, watched in rounds]),
        "to_prefill": summary([watched / plain for plain, watched in rounds]),
    }
    name = f"profile_cost-{arguments.model.name}-{arguments.quantize}"
    print(f"{name}: {result['to_prefill']['median']:.2f} of a plain prefill of {corpus.num_tokens} tokens")
    print("saved", save(name, result))


if __name__ == "__main__":
    main()
