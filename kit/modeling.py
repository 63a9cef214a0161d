"""A model of this project as transformers and lm-evaluation-harness call one.

kit/weights.py copies this file into the folder of an exported model, beside the model's own files, and names its
classes in the place of `variant`. transformers 5.24 calls a cache `cache` that was `past_key_values` before.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .fast import next_token_loss
from .pythia_base import Cache  # type: ignore[import-not-found]
from .variant import Config, Model  # type: ignore[import-not-found]

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
IGNORED = ("cache_position", "return_dict")  # what transformers 4 says twice


class ExportedConfig(PretrainedConfig):
    """model_args: the fields of the model's own config."""

    model_type = "kv-cache-pythia"

    def __init__(self, model_args: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_args = model_args or {}


class ExportedCache(Cache):
    """The model's own cache with what `generate` asks of one."""

    is_compileable = False
    is_linear = (False,)  # asked by transformers 5.24: a prompt's tokens are counted from get_seq_length on

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beams: Tensor) -> None:
        """Each row goes on from the row that beams (B,) names."""
        for tensor in self.tensors():
            tensor.copy_(tensor[beams])


class ExportedModel(PreTrainedModel, GenerationMixin):
    """A causal language model. Raises ValueError for what it cannot do, such as padding on the left."""

    config_class = ExportedConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False

    def __init__(self, config: ExportedConfig) -> None:
        super().__init__(config)
        self.model = Model(Config(**config.model_args))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """The model has initialised itself."""

    def make_cache(self, batch_size: int, max_len: int) -> Cache:
        """An empty cache; max_len is the longest text that it can hold."""
        cache: Cache = self.model.init_cache(batch_size, max_len)
        cache.__class__ = ExportedCache
        return cache

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs[CACHE] = self.make_cache(rows, max_cache_length)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, T) -> logits (B, T or logits_to_keep, V); with labels (B, T) their next-token loss.

        Without use_cache=True a call keeps no cache; `generate` asks for one itself.
        """
        unknown = [k for k, value in others.items() if k not in IGNORED and value is not None and value is not False]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not supported by this model")
        if attention_mask is not None and (attention_mask.int().diff(dim=1) > 0).any():
            raise ValueError("padding before or within a text is not supported: batch prompts of equal length")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = self.make_cache(len(input_ids), self.model.config.max_position_embeddings)
        h = self.model.hidden_states(input_ids, cache)[:, -logits_to_keep:]
        logits = F.linear(h, self.model.head_weight)
        loss = None if labels is None else next_token_loss(logits[:, :-1], labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
