"""The language model as a Hugging Face model: embedding, blocks, a norm and a head; loss, cache, padding and documents."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..errors import bad_type, bad_value
from ..layers import RNN
from .block import Block, Recurrence
from .cache import Cache, boundaries
from .config import ParaRNNConfig
from .conv import CausalConv
from .gated_delta import GatedDelta
from .generation import StatefulGeneration
from .loss import IGNORED, next_token_loss, token_losses
from .parts import ResidualLinear, RMSNorm, working

CACHE = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
"""What the library's version calls the cache in its outputs."""


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """`loss` (None without labels), `logits`, the cache, and `z_loss`, the part of `loss` that is no cross-entropy, where there is one."""

    z_loss: Tensor | None = None


class ParaRNNPreTrainedModel(PreTrainedModel):
    """Initialization, saving and loading of the models below.

    Embeddings and linear layers are drawn from N(0, r^2), those that write to the residual stream from N(0, r^2 / 2L), with
    r = `initializer_range` and L blocks; recurrent layers, decay rates and convolutions as they draw themselves.
    """

    config_class = ParaRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: ParaRNNConfig, *args: Any, **kwargs: Any):
        if not isinstance(config, ParaRNNConfig):
            bad_type("config", config, "a ParaRNNConfig")
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ResidualLinear):
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.num_hidden_layers))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, (RNN, GatedDelta, CausalConv, RMSNorm)):
            module.reset_parameters()
        elif isinstance(module, Block):
            nn.init.ones_(module.residual_scale)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as after `to_empty` of a model that was built on the meta device."""
        for p in self.parameters():
            p._is_hf_initialized = False  # type: ignore[attr-defined]
        self.apply(self._init_weights)
        self.tie_weights()

    def recurrent_layers(self) -> list[RNN]:
        """The recurrent layer of each block, none with other mixers; assign their `solver` to choose how time runs."""
        return [m.rnn for m in self.modules() if isinstance(m, Recurrence)]


class ParaRNNModel(ParaRNNPreTrainedModel):
    """Embedding, `num_hidden_layers` blocks and a norm: token ids (B, T) -> hidden states (B, T, d)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        reset: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run over tokens in parallel over time; arguments as in `ParaRNNForCausalLM.forward`."""
        x = working(self._embed(input_ids, inputs_embeds))
        past = Cache() if past_key_values is None else past_key_values
        self._check(x, attention_mask, past, reset)
        if attention_mask is not None:
            begins = boundaries(attention_mask, x.shape[1])
            reset = begins if reset is None else reset | begins
        use_cache = past_key_values is not None or (not self.training if use_cache is None else use_cache)
        checkpointed = self.gradient_checkpointing and self.training
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        after, before = [], []
        for k, block in enumerate(self.layers):
            if states:
                before.append(x)
            call = self._checkpointed(block) if checkpointed else block
            x, new = call(x, past.blocks[k] if past.blocks else None, reset, use_cache)
            after.append(new)
        if use_cache:
            past.blocks, past.length = after, past.length + x.shape[1]
        x = self.norm(x)
        out = BaseModelOutputWithPast(x, past if use_cache else None, (*before, x) if states else None)  # type: ignore[arg-type]
        return out.to_tuple() if return_dict is False else out

    def _checkpointed(self, block: nn.Module) -> Any:
        """The block under activation checkpointing, never reentrant: that would lose the gradients through a past."""
        function: Any = self._gradient_checkpointing_func
        options = {"use_reentrant": False} if "use_reentrant" in getattr(function, "keywords", {}) else {}
        return partial(function, block.__call__, **options)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            came = "neither" if input_ids is None else "both"
            bad_value("input_ids and inputs_embeds", came, "one of them")
        if inputs_embeds is not None:
            if (
                inputs_embeds.dim() != 3
                or inputs_embeds.shape[2] != self.config.hidden_size
                or not inputs_embeds.numel()
            ):
                bad_value("inputs_embeds", inputs_embeds, f"shape (B, T, {self.config.hidden_size}), not empty")
            return inputs_embeds
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            bad_type("input_ids", input_ids, "an int64 tensor (B, T) of token ids")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            bad_value("input_ids", input_ids, "shape (B, T), not empty")
        return self.embed_tokens(input_ids)

    def _check(self, x: Tensor, attention_mask: Tensor | None, past: Any, reset: Tensor | None) -> None:
        batch, time = x.shape[:2]
        if not isinstance(past, Cache):
            bad_type("past_key_values", past, "None or a parashoot.lm.Cache")
        if past.blocks and (len(past.blocks) != len(self.layers) or past.batch_size != batch):
            came = f"{len(past.blocks)} blocks, batch {past.batch_size}"
            bad_value("past_key_values", came, f"{len(self.layers)} blocks, batch {batch}")
        if reset is not None and (reset.dtype != torch.bool or tuple(reset.shape) != (batch, time)):
            bad_value("reset", reset, f"torch.bool of shape (B, T) = {(batch, time)}")
        mask, text = attention_mask, past.length + time
        if mask is not None and (mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < text):
            bad_value(
                "attention_mask", mask, f"shape (B, past and T) = ({batch}, {text} or more), 0 for padding",
                "It is over what the past has seen, too." if past.length else "",
            )  # fmt: skip


class ParaRNNForCausalLM(StatefulGeneration, ParaRNNPreTrainedModel, GenerationMixin):
    """A `ParaRNNModel` and a head: token ids (B, T) -> logits (B, T, V). Source: Danieli et al. 2025 (arXiv 2510.21450)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: ParaRNNConfig):
        super().__init__(config)
        self.model = ParaRNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        reset: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Run over tokens in parallel over time, from `past_key_values` on if there is one.

        - `input_ids` (B, T) int64, or `inputs_embeds` (B, T, d).
        - `attention_mask` (B, T), longer by what `past_key_values` have seen: 0 for padding. Where text begins after padding, nothing
          earlier reaches it, and what padding would predict is not scored, so left padding changes no result. Outputs at padding, and
          the cache after padding on the right, mean nothing.
        - `past_key_values`: continued from, and left holding the past after the last token.
        - `labels` (B, T) int64: usually `input_ids`; the logits at t are scored against the label at t + 1, and labels of -100 are
          left out. At least two tokens are then needed. The loss is the mean over the tokens scored, or their sum over
          `num_items_in_batch`; while training `z_loss` of the configuration is part of it, and stands in the output by itself.
        - `reset` (B, T) bool: a new document begins at t; nothing of earlier tokens reaches it.
        - `use_cache`: return the cache; by default where not training.
        - `logits_to_keep`: only the last so many logits, 0 for all, or the positions in a tensor.
        - `output_hidden_states`: also what enters each block and, last, what the head reads, (B, T, d) each; by default as in the configuration.
        - `output_attentions`: None or False, as there are none to return; wrappers of models pass it.

        While training with labels the logits are never formed as a whole, and `logits` is None. Raises `ArgumentError` and
        `ArgumentTypeError`.
        """
        if output_attentions:
            bad_value("output_attentions", "True", "None or False", "No mixer keeps a matrix of attention.")
        given = (input_ids, attention_mask, past_key_values, inputs_embeds, reset, use_cache, output_hidden_states)
        base = self.model(*given, return_dict=True)
        hidden = base.last_hidden_state
        loss = logits = z_part = None
        if labels is not None:
            if labels.dtype != torch.int64 or labels.shape != hidden.shape[:2]:
                bad_value("labels", labels, f"torch.int64 of the shape of input_ids, {tuple(hidden.shape[:2])}")
            if labels.shape[1] < 2:
                bad_value("labels", labels, "at least two tokens", "The first one has nothing that predicts it.")
            if attention_mask is not None:
                padding = attention_mask[:, -labels.shape[1] :][:, :-1] == 0
                labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(padding, IGNORED)], 1)
            self._check_head()
            z_loss = self.config.z_loss if self.training else 0.0
            options = {"z_loss": z_loss, "num_items": num_items_in_batch}
            loss, z_part = next_token_loss(hidden, self.lm_head.weight, labels, **options)
        if labels is None or not self.training:
            kept = (
                slice(-logits_to_keep if logits_to_keep else None, None)
                if isinstance(logits_to_keep, int)
                else logits_to_keep
            )
            logits = self.lm_head(hidden[:, kept])
        z_part = z_part if self.training and self.config.z_loss else None
        out = CausalLMOutput(loss, logits, getattr(base, CACHE), base.hidden_states, z_loss=z_part)
        return out.to_tuple() if return_dict is False else out

    def _check_head(self) -> None:
        """The loss reads the head's weight, a piece of the tokens at a time, and nothing else of it."""
        head: Any = self.lm_head
        if torch.compiler.is_compiling():
            return
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or head.bias is not None:
            bad_type(
                "lm_head", head, "a torch.nn.Linear without bias", "Compute the loss of another head from its logits."
            )

    def token_losses(
        self, input_ids: Tensor, targets: Tensor, past_key_values: Cache | None = None, reset: Tensor | None = None
    ) -> Tensor:
        """-ln p of `targets` (B, N), what follows the last N of `input_ids` (B, T): (B, N) in float32 or better.

        The other arguments as in `forward`. Logits exist for a piece of the tokens at a time.
        """
        given = (input_ids, None, past_key_values, None, reset, past_key_values is not None, False)
        hidden = self.model(*given, return_dict=True).last_hidden_state
        return token_losses(hidden[:, -targets.shape[1] :], self.lm_head, targets)
