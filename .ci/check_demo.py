"""Checks the demo's JSON file: python check_demo.py [--mutated] FILE."""

import json
import sys

mutated = "--mutated" in sys.argv
with open(sys.argv[-1]) as file:
    facts = json.load(file)
assert facts["models"] == 5, facts["models"]
assert 0 < facts["arena_bytes"] <= facts["unique_bytes"] / 2, facts
assert facts["requests"] >= 2, facts["requests"]
others = {"vllm": {"restart"}, "transformers": {"reload", "mmap"}}[facts["engine"]]
assert facts["ttft_ms"].keys() == others | {"on_demand", "prewarmed"}, facts["ttft_ms"]
for row in facts["ttft_ms"].values():
    assert 0 < row["p50"] <= row["p99"], row
right = facts["tokens_match"] and facts["bytes_match"]
assert right != mutated, f"tokens {facts['tokens_match']}, bytes {facts['bytes_match']}"
print("the demo's results are", "wrong, as they should be" if mutated else "right")
