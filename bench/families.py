"""Which causal model families of transformers compute the same in the arena as alone?

The bench builds a small random model of each family, saves it and binds it three times, so that the
third is built from the cache. It then runs the model once while its layers stream in. A model that
transformers would fuse or split is refused with the name of a tensor. A family that needs more than
smaller sizes to be built is not tried.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lib.harness import MIB, Bench, scratch
from warmserve_rt import Runtime
from warmserve_rt.engines.transformers import load

PROMPT = torch.tensor([[7, 3, 55, 20, 9, 41, 6, 30, 12]])
LARGEST = 30_000_000  # parameters
SETTINGS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rescale_every": 0}
# The names that families give to their sizes. A configuration gets those that it has.
SIZES = {
    96: "vocab_size intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size",
    64: "hidden_size n_embd d_model embedding_size attention_hidden_size word_embed_proj_dim "
    "max_position_embeddings n_positions n_ctx",
    48: "moe_intermediate_size",
    32: "shared_expert_intermediate_size mamba_d_head",
    16: "d_kv kv_channels q_lora_rank kv_lora_rank v_head_dim rotary_dim",
    8: "qk_rope_head_dim qk_nope_head_dim state_size ssm_state_size mamba_d_state",
    4: "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads "
    "mamba_n_heads num_experts num_local_experts n_routed_experts linear_num_value_heads",
    2: "num_key_value_heads num_experts_per_tok multi_query_group_num linear_num_key_heads",
    1: "n_group topk_group first_k_dense_replace",
}
SMALL = SETTINGS | {name: size for size, names in SIZES.items() for name in names.split()}
# transformers does not annotate its factories.
AUTO: Any = AutoModelForCausalLM
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
# Some families have several kinds of blocks and need more than two, or derive the head's size.
ATTEMPTS = ({"head_dim": 16, **dict.fromkeys(DEPTH, 2)}, dict.fromkeys(DEPTH, 8))


def small_models(kind: str) -> Iterator[Any]:
    """Yield random models of a family that transformers itself can run."""
    for attempt in ATTEMPTS:
        try:
            large = AutoConfig.for_model(kind)
            config = AutoConfig.for_model(kind, **shrunk(large, SMALL | attempt))
            with torch.device("meta"):
                size = sum(p.numel() for p in AUTO.from_config(config).parameters())
            if size > LARGEST:
                continue
            torch.manual_seed(0)
            model = AUTO.from_config(config).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.05)
            for part in model.modules():  # as after training; some are zeroed again on load
                if isinstance(part, torch.nn.Embedding) and part.padding_idx is not None:
                    part.weight[part.padding_idx].zero_()
            model(PROMPT)
        except Exception:  # families fail in many ways if sizes do not fit together
            continue
        yield model


def shrunk(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    known = config.to_dict()
    found = {name: size for name, size in sizes.items() if name in known}
    text = getattr(config, "text_config", None)
    if text is not None and not isinstance(text, dict):
        found["text_config"] = shrunk(text, sizes)
    return found


def compared(kind: str, directory: Path) -> str:
    """Return "equal", "close", "different", the refusal, or "not tried"."""
    path = directory / kind
    for model in small_models(kind):
        try:
            model.save_pretrained(path)
            plain = AUTO.from_pretrained(path).eval()
        except Exception:
            continue
        for parameter in plain.parameters():  # gives the same alignment as ours
            parameter.data = parameter.data.clone()
        wanted = plain(PROMPT).logits
        with Runtime("host", 256 * MIB) as runtime:
            for number in range(3):
                try:
                    module: Any = load(runtime, path, name=f"model-{number}")
                except ValueError as error:
                    return f"refused: {error}"
            with runtime.lease("model-2", streaming=True):
                logits = module(PROMPT).logits
        if torch.equal(logits, wanted):
            return "equal"
        return "close" if torch.allclose(logits, wanted, atol=1e-4) else "different"
    return "not tried"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="transformers' names (default: all)")
    bench = Bench.start("families", parser, families=["llama"])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    output: Any = logging
    output.set_verbosity_error()
    output.disable_progress_bar()
    counts = dict.fromkeys(("equal", "close", "refused", "not tried", "different"), 0)
    with scratch() as directory:
        for kind in bench.args.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            said = compared(kind, directory)
            print(f"  {kind:30} {said[:100]}", flush=True)
            counts[said.split(":")[0]] += 1
    for name in ("equal", "close", "refused", "not tried"):
        bench.row(f"families_{name.replace(' ', '_')}", counts[name], "")
    bench.target("families_different", counts["different"], "", "=", 0)
    bench.finish()


if __name__ == "__main__":
    main()
