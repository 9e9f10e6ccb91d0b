"""The base model's folder: tokenizer, processor, configuration, and an initialisation that can learn.

Everything saved here is a stock Hugging Face class, so that transformers, verl and vLLM load the folder as
they load any Qwen3.5 checkpoint; no remote code. `vocab_size == len(tokenizer)` exactly: verl masks ids
beyond the tokenizer in the rollout only, and the two policies would differ.
"""

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from data.miniature import world
from data.miniature.responses import response
from vopd.views import HINTED

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 1024
PATCH = 8
MERGE = 2
CHAT_TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for c in m.content -%}"
    "{%- if c.type == 'image' or 'image' in c or 'image_url' in c -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif c.type == 'video' or 'video' in c -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in c -%}{{- c.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# Plain English beyond the miniature's own words, so that top-k is a real truncation of a real vocabulary.
COMMON_WORDS = """
the of and to in is that for it was on are with as his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some
so these would other into has more her two like him see time could no make than first been its who now
people my made over did down only way find use may water long little very after words called just where most
know get through back much before go good new write our used me man too any day same right look think also
around another came come work three word must because does part even place well such here take why things
help put years different away again off went old number great tell men say small every found still between
name should home big give air line set own under read last never us left end along while might next sound
below saw something thought both few those always looked show large often together asked house world going
want school important until form food keep children feet land side without boy once animals life enough took
sometimes four head above kind began almost live page got earth need far hand high year mother light parts
country father let night following picture being study second eyes soon times story boys since white days
ever paper hard near sentence better best across during today others however sure means knew try told young
miles sun ways thing whole hear example heard several change answer room sea against top turned learn point
city play toward five using himself usually money seen car morning given order open ground system question
image
""".split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with exactly `VOCABULARY` entries, from the miniature's own text and common words."""
    draws = torch.Generator().manual_seed(0)
    lines = []
    for i in range(1200):
        s = world.scene(0, "probe", i, (*world.FAMILIES, world.HOLDOUT_FAMILY), clutter=(4, 4))
        seeded = world.np.random.default_rng([int(torch.randint(1 << 30, (1,), generator=draws)), i])
        lines += [s.question, response(s.facts, s.family, s.answer, seeded)]
    lines += [HINTED.format(question="", answer=letter) for letter in world.LETTERS_OF_OPTIONS] * 40
    lines += ["user\nassistant\nsystem\n"] * 200
    lines += [f" {word} {word.capitalize()}" for word in COMMON_WORDS] * 3
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS[1:]),
        model_max_length=2048,
    )
    built.chat_template = CHAT_TEMPLATE
    return built


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    """Images pass through at their own size (32 x 32 to 128 x 128, multiples of 16)."""
    size = {"shortest_edge": 32 * 32, "longest_edge": world.SIDE * world.SIDE}
    grid = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "image_mean": [0.5] * 3}
    grid |= {"image_std": [0.5] * 3, "size": size}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**grid),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**grid),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5Config:
    """Three GatedDeltaNet layers and one of full attention, as every four layers of Qwen3.5."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.05,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
            "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        "max_position_embeddings": 2048, "mtp_num_hidden_layers": 0, "mamba_ssm_dtype": "float32",
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 3, "out_hidden_size": 128,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        "num_position_embeddings": 256, "initializer_range": 0.05,
    }  # fmt: skip
    return Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip


def build_model(config: Qwen3_5Config, seed: int) -> Qwen3_5ForConditionalGeneration:
    """Random weights, float32.

    The library's own GatedDeltaNet initialisation (dt_bias = 1, A ~ U(0, 16)) forgets about e^-10 a token and
    cannot learn a look-up from scratch. Here: time steps log-spaced in 0.001-0.1 and A in 1-8, as in
    Mamba-2 and flash-linear-attention, and convolution weights in +-0.5.
    """
    torch.manual_seed(seed)
    model = Qwen3_5ForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        if layer.layer_type != "linear_attention":
            continue
        mixer = layer.linear_attn
        heads = mixer.dt_bias.numel()
        step = torch.logspace(-3, -1, heads)
        with torch.no_grad():
            mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
            mixer.A_log.copy_(torch.linspace(1, 8, heads).log())
            torch.nn.init.uniform_(mixer.conv1d.weight, -0.5, 0.5)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model


def save(model: Qwen3_5ForConditionalGeneration, processor: Qwen3VLProcessor, folder: Path) -> None:
    """bf16 safetensors, configuration, tokenizer and processor: a folder like any other checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    copy = Qwen3_5ForConditionalGeneration(config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def parameters(model: torch.nn.Module) -> int:
    """Number of distinct parameters (tied weights once)."""
    return sum(math.prod(p.shape) for p in model.parameters())
