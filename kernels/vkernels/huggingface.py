"""One line for a Hugging Face Llama, Qwen2 or Qwen3: `vkernels.patch(model)` lets its layers run on these ops.

Parameters, state dicts and configs stay as they are: only `forward` of single modules is replaced, until `unpatch`.
Nothing of transformers is imported: whoever has such a model has it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import partial
from types import ModuleType

import torch
from torch import nn

from vkernels.activations import swiglu
from vkernels.attention import varlen_attention
from vkernels.modules import summed_loss
from vkernels.norms import rms_norm
from vkernels.rotary import qk_norm_rope, rope

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PARTS = ("norm", "mlp", "rotary", "head", "attention")
ATTENTION = "vkernels"  # the name of the attention function in transformers' registry


def patch(model: nn.Module, parts: Collection[str] = ("norm", "mlp", "rotary", "head")) -> dict[str, list[str]]:
    """Replace `parts` of a LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM. -> the modules replaced, by part.

    norm: RMSNorm, whose result keeps the input's dtype. mlp: silu(gate) * up in one op. rotary: queries and keys in one
    op, with Qwen3's norms of them; the angles stay float32 in a bf16 model. head: in training mode, labels give the
    loss alone: `logits` is None and no logits exist at once (in eval mode all is as before).
    attention (not by default): packed documents stay apart by `cu_seq_lens_q` or by position_ids that start again at 0,
    padding on either side by a 2D mask; no mask of S x S, no sync. No dropout.
    Patch before wrapping (compile, FSDP, hooks). Part 'head' reads lm_head.weight in the root's forward: do not shard
    lm_head on its own. ValueError for another class of model, or one that is patched already.
    """
    modeling, family = _modeling_of(model)
    if isinstance(parts, str):
        raise ValueError(f"vkernels.patch: parts is the text {parts!r}, expected a list such as [{parts!r}]")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"vkernels.patch: parts {unknown}, expected some of {list(PARTS)}")
    forwards = _forwards(model, modeling, family, parts)
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise ValueError(f"vkernels.patch: {name or 'the model'} has a forward of its own, expected a fresh model")
    if "mlp" in parts and model.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"vkernels.patch: the activation is {model.config.hidden_act!r}, expected 'silu' for part 'mlp'"
        )
    if "head" in parts:
        _check_head(model)
    replaced: dict[str, list[str]] = {part: [] for part in parts}
    for name, module in model.named_modules():
        if type(module) in forwards:
            part, forward = forwards[type(module)]
            module.forward = partial(forward, module)  # unlike a bound method, it can be pickled
            replaced[part].append(name)
    if "attention" in parts:
        replaced["attention"] = [n for n, m in model.named_modules() if type(m).__name__ == f"{family}Attention"]
        _register_attention()
        model._before_vkernels = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
    return replaced


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: the model is as it was. Nothing happens to one that is not patched."""
    for module in model.modules():
        forward = getattr(vars(module).get("forward"), "func", None)
        if getattr(forward, "__module__", None) == __name__:
            del module.forward
    if hasattr(model, "_before_vkernels"):
        model.set_attn_implementation(model._before_vkernels)
        del model._before_vkernels


def _register_attention() -> None:
    sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)


def _modeling_of(model: nn.Module) -> tuple[ModuleType, str]:
    kind = type(model)
    for folder, family in FAMILIES.items():
        if (kind.__module__, kind.__name__) == (
            f"transformers.models.{folder}.modeling_{folder}",
            f"{family}ForCausalLM",
        ):
            return sys.modules[kind.__module__], family
    known = ", ".join(f"{family}ForCausalLM" for family in FAMILIES.values())
    raise ValueError(f"vkernels.patch: the model is a {kind.__module__}.{kind.__name__}, expected one of {known}")


def _forwards(model, modeling: ModuleType, family: str, parts) -> dict[type, tuple[str, Callable]]:
    """Class -> (part, what replaces its forward)."""
    of = {
        "RMSNorm": ("norm", _rms_norm),
        "MLP": ("mlp", _mlp),
        "Attention": ("rotary", _attention),
        "RotaryEmbedding": ("rotary", _angles),
        "ForCausalLM": ("head", _causal_lm),
    }
    return {getattr(modeling, family + name): what for name, what in of.items() if what[0] in parts}


def _check_head(model: nn.Module) -> None:
    head, loss = model.lm_head, getattr(model.loss_function, "__name__", model.loss_function)
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"vkernels.patch: lm_head is {head}, expected a plain Linear without bias for part 'head'")
    if loss != "ForCausalLMLoss":
        raise ValueError(f"vkernels.patch: the loss is {loss}, expected ForCausalLMLoss for part 'head'")


def _rms_norm(self, hidden_states):
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self, x):
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _angles(self, x, position_ids):
    """-> cos, sin float32[B * S, D/2] for all layers, as `rope` takes them."""
    tables = type(self).forward(self, x.new_empty(0, dtype=torch.float32), position_ids)
    return tuple(t[..., : t.shape[-1] // 2].expand(x.shape[0], -1, -1).flatten(0, 1).contiguous() for t in tables)


def _attention(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
    B, S, _ = hidden_states.shape
    q, k, v = (
        project(hidden_states).view(B * S, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if hasattr(self, "q_norm"):
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = qk_norm_rope(q, k, *weights, *position_embeddings, self.q_norm.variance_epsilon)
    else:
        q, k = rope(q, k, *position_embeddings)
    q, k, v = (x.unflatten(0, (B, S)).transpose(1, 2) for x in (q, k, v))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    modeling = sys.modules[type(self).__module__]
    attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, modeling.eager_attention_forward
    )
    if hasattr(self, "sliding_window"):
        kwargs["sliding_window"] = self.sliding_window
    dropout = self.attention_dropout if self.training else 0.0
    out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(out.reshape(B, S, -1).contiguous()), weights


def _causal_lm(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    labels=None,
    use_cache=None,
    logits_to_keep=0,
    **kwargs,
):
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    if labels is None or not self.training:
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    whole = kwargs.pop("return_dict", None)
    outputs = self.model(**inputs, **kwargs)
    loss = _loss(outputs.last_hidden_state, self.lm_head.weight, labels, **kwargs)
    result = sys.modules[type(self).__module__].CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return result if (self.config.return_dict if whole is None else whole) else result.to_tuple()


def _loss(hidden, weight, labels, *, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    """As transformers' ForCausalLMLoss, from the hidden states."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    total, count = summed_loss(hidden, weight, shift_labels.to(hidden.device), ignore_index)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return total / (count if num_items_in_batch is None else num_items_in_batch)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """transformers' interface: query[B, Hq, S, D], key and value[B, Hk, K, D] -> ([B, S, Hq, D], None). Causal.

    Documents come by cu_seq_lens_q, or by position_ids that start again at 0 where there is neither cache nor mask.
    Only for the families above: what other models ask of their masks would be lost here.
    """
    if type(module).__name__ not in [f"{family}Attention" for family in FAMILIES.values()]:
        known = ", ".join(FAMILIES.values())
        raise ValueError(f"vkernels attention: called by a {type(module).__name__}, expected that of {known}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if dropout or softcap or s_aux is not None or not causal:
        asked = f"dropout {dropout}, softcap {softcap}, sinks {s_aux is not None}, causal {causal}"
        raise ValueError(f"vkernels attention: {asked}, expected causal attention without dropout, softcap and sinks")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"vkernels attention: a mask of {list(attention_mask.shape)}, expected [batch, keys] or none")
    B, _, S, _ = query.shape
    K = key.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    kv_lo = None
    if cu_seq_lens_q is not None:
        cu_q, cu_k = (x.to(torch.int32) for x in (cu_seq_lens_q, cu_seq_lens_k))
        lengths = int(max_length_q or S), int(max_length_k or K)
    else:
        cu_q, cu_k = (torch.arange(B + 1, device=q.device, dtype=torch.int32) * n for n in (S, K))
        lengths = S, K
        kv_lo = _document_starts(B, S, K, attention_mask, position_ids, q.device)
    if sliding_window is not None:
        first = _last_keys(B, S, K, q.device) + 1 - sliding_window
        kv_lo = first.clamp_min(0) if kv_lo is None else torch.maximum(first, kv_lo)
    out = varlen_attention(q, k, v, cu_q, cu_k, *lengths, kv_lo=kv_lo, scale=scaling)
    return out.unflatten(0, (B, S)), None


def _last_keys(B: int, S: int, K: int, device: torch.device) -> torch.Tensor:
    """The last key that each query sees, int32[B * S], as a row of the flat keys."""
    rows = torch.arange(B, device=device, dtype=torch.int32)[:, None] * K
    return (rows + torch.arange(K - S, K, device=device, dtype=torch.int32)).flatten()


def _document_starts(B, S, K, mask, position_ids, device) -> torch.Tensor | None:
    """The first key that each query sees, int32[B * S], as a row of the flat keys; None where it is the batch row's."""
    rows = torch.arange(B, device=device, dtype=torch.int32)[:, None] * K
    if mask is not None:  # padding on the left; that on the right is seen by padding only
        return (rows + mask[:, -K:].int().argmax(-1, keepdim=True).int()).expand(B, S).flatten()
    if position_ids is None or S != K or position_ids.dim() != 2:
        return None
    at = torch.arange(S, device=device, dtype=torch.int32)
    starts = torch.where(position_ids == 0, at, 0).cummax(-1).values
    return (rows + starts.int().expand(B, S)).flatten()


def _mask(batch_size, q_length, kv_length, *args, attention_mask=None, **kwargs):
    """The [batch, keys] mask as it came: `attention` reads it."""
    return None if attention_mask is None else attention_mask[:, -kv_length:]
