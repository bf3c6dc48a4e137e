"""llama.cpp as a contender for the truth, in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

PROBE = """
import json, sys
import xllamacpp
asked = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = sys.argv[1], 512, 1, False, 0
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[2:]]
server = xllamacpp.Server(params)
found = []
for prompt in asked:
    answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": 100, "temperature": 0.0})
    first = answer["choices"][0]["logprobs"]["content"][0]
    found.append({one["id"]: one["logprob"] for one in first["top_logprobs"]})
print("\\n" + json.dumps(found))
"""


def said_by_llama_cpp(model: Path, prompts: list[list[int]], *adapters: Path) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest next tokens, by the interpreter that GOSSAMER_LLAMA_CPP names."""
    words = [os.environ["GOSSAMER_LLAMA_CPP"], "-c", PROBE, str(model), *map(str, adapters)]
    ran = subprocess.run(words, input=json.dumps(prompts), capture_output=True, text=True, check=True)
    return [{int(one): value for one, value in row.items()} for row in json.loads(ran.stdout.splitlines()[-1])]
