"""Tiny checkpoints with random weights, built on the spot: real architectures, real files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    ConvBertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    EuroBertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    RobertaConfig,
    SqueezeBertConfig,
)

from rayreward.packing import PackedLinear, packed

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**_SHAPE, num_key_value_heads=2),
    "gemma": lambda: GemmaConfig(**_SHAPE, num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        vocab_size=400,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen3": lambda: Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=8),
    "mistral": lambda: MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=32),
    "gemma2": lambda: Gemma2Config(
        **_SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=32, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=32, query_pre_attn_scalar=8
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SHAPE,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **_SHAPE | {"num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=10,
        linear_value_head_dim=24,
    ),
    "phi3": lambda: Phi3Config(**_SHAPE, num_key_value_heads=2),
    "olmo2": lambda: Olmo2Config(**_SHAPE, num_key_value_heads=2),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE),
    "opt": lambda: OPTConfig(**_SHAPE, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": lambda: BloomConfig(
        hidden_size=32,
        n_layer=2,
        n_head=4,
        vocab_size=400,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon": lambda: FalconConfig(**_SHAPE),
    "bert": lambda: BertConfig(**_SHAPE),
    "roberta": lambda: RobertaConfig(**_SHAPE),
    "electra": lambda: ElectraConfig(**_SHAPE, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        vocab_size=400,
        max_position_embeddings=256,
        pad_token_id=0,
    ),
    "modernbert": lambda: ModernBertConfig(
        **_SHAPE,
        local_attention=32,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "deberta": lambda: DebertaV2Config(
        **_SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"], pooler_hidden_size=32
    ),
    "eurobert": lambda: EuroBertConfig(**_SHAPE, num_key_value_heads=2),
    "squeezebert": lambda: SqueezeBertConfig(**_SHAPE, embedding_size=32),
    "convbert": lambda: ConvBertConfig(**_SHAPE, embedding_size=32),
}
ENCODERS = (
    *("bert", "roberta", "electra", "distilbert", "modernbert", "deberta"),
    *("eurobert", "squeezebert", "convbert"),
)
NOT_FLAT = ("bloom", "falcon", "deberta", "eurobert", "squeezebert")
"""They do not call transformers' attention interface, or make a reward of all tokens' states."""
NOT_PADDED = ("convbert",)
"""What a text gives depends on how far it is padded."""
FLAT = tuple(name for name in CONFIGS if name not in (*NOT_FLAT, *NOT_PADDED))


@cache
def _trained() -> str:
    """A byte-level BPE tokenizer, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "What is the best answer to a question about the weather? It is the one that is true."
    tokenizer.train_from_iterator([text] * 4, trainer)
    return tokenizer.to_str()


def make_tokenizer(*, bos: bool = False, chat: bool = True, pad: bool = True) -> Any:
    """A tokenizer; with `bos` it puts `<s>` before every plain text."""
    backend = Tokenizer.from_str(_trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        **({"pad_token": "<pad>"} if pad else {}),
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_checkpoint(
    directory: Path,
    architecture: str = "llama",
    *,
    head: bool = False,
    num_labels: int = 1,
    dtype: torch.dtype = torch.float32,
    weights_seed: int = 1,
    shape: dict[str, Any] | None = None,
    **tokenizer: bool,
) -> Path:
    """Writes a checkpoint: headless as a language model is, or with a trained-looking head."""
    config = CONFIGS[architecture]()
    if shape is not None:
        kept = {name: value for name, value in config.to_dict().items() if name != "head_dim"}
        config = type(config)(**{**kept, **shape})
    auto: Any = AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM
    if head:
        config.num_labels = num_labels
        auto = AutoModelForSequenceClassification
    state = torch.get_rng_state()
    torch.manual_seed(weights_seed)
    auto.from_config(config).to(dtype).save_pretrained(directory)
    torch.set_rng_state(state)
    make_tokenizer(**tokenizer).save_pretrained(directory)
    return directory


def flip_one_bit(layer: PackedLinear) -> None:
    """Flips the lowest bit of one weight of a loaded model's layer, where it is kept."""
    weight = layer.plain()["weight"]
    weight.view(torch.int32)[3, 5] ^= 1
    layer.weight = packed(weight)
