"""The latent loop a second time: from a checkpoint's files and the design's semantics table alone.

Everything here is a plain call of ``transformers`` or ``torch``, or PEFT's own ``set_adapter`` and
``disable_adapter``. Nothing of ``slr_core`` is used: of one request alone, no batch, no padding.
"""

import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def plain_base(folder: Path):
    """The base model of a checkpoint folder."""
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto").eval()


def with_peft(model, folder: Path, names):
    """The same with adapters of the folder, by PEFT."""
    with warnings.catch_warnings():
        # PEFT's own ways with transformers 5 and with Conv1D.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        peft_model = PeftModel.from_pretrained(model, folder / "loops" / names[0], adapter_name=names[0])
        for name in names[1:]:
            peft_model.load_adapter(folder / "loops" / name, adapter_name=name)
    return peft_model.eval()


def clone(cache):
    """An independent copy of a cache."""
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied


@dataclass
class Derived:
    """What a request comes to; the names are those of ``slr_core.generation.reference.Result`` and its records."""

    states: list = field(default_factory=list)
    records: list = field(default_factory=list)
    passes: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    exit_reason: str = "max_iterations"
    iterations_per_token: list = field(default_factory=list)


@torch.inference_mode()
def derive(folder: Path, prompt: list[int], settings, max_new_tokens: int) -> Derived:
    """Run one request.

    Args:
        folder: the checkpoint.
        prompt: token ids.
        settings: has max_iterations, min_iterations, criterion, threshold and patience.
        max_new_tokens: of the answer.
    """
    parts, out, P = Parts(folder), Derived(), len(prompt)
    if parts.loop["workspace"] == "token":
        return derive_token(parts, out, prompt, settings, max_new_tokens)
    kind, table = parts.loop["workspace"], parts.table
    tokens_in = lambda ids: table[torch.tensor(ids)]  # noqa: E731
    run = lambda *args: parts.run(out.passes, *args)  # noqa: E731

    # Before the loop: the plain base over the prompt, where the workspace does not replace it.
    cache = DynamicCache()
    if kind != "prompt":
        state = run(tokens_in(prompt), 0, None, cache)[-1]
    h = [{"append": lambda: state[None], "block": lambda: parts.w["workspace.vectors"]}.get(
        kind, lambda: tokens_in(prompt))()]  # fmt: skip

    def feed(hidden, t):
        """What iteration t gets from the state before it."""
        if parts.loop["feedback"] == "shifted":
            if t == 1:
                return hidden
            hidden = torch.cat([state[None], hidden[:-1]])
        return parts.project(hidden)

    first = 0 if kind == "append" else 1  # the first t whose h_t is a state

    moves, settled, change = [], 0, None
    while len(h) <= settings.max_iterations:
        t = len(h)
        u = parts.timestep(feed(h[-1], t), t, change)
        adapter = parts.adapter(t)
        if kind == "append":  # a new position each, whose keys and values stay
            g = run(u, P + t - 1, adapter, cache)
        elif kind == "block":  # the same K positions each, over the prompt's keys and values alone
            g = run(u, P, adapter, clone(cache))
        else:  # the prompt's positions, nothing kept
            g = run(u, 0, adapter, DynamicCache())
        h.append(parts.residual(g, h[-1], h[0]))

        record, distances = parts.measure(h, g, is_state=t > first)
        step = record.pop("step")
        # Undefined after a step of length zero: shifted feedback alone reaches its fixed point exactly in K iterations.
        contraction = step / moves[-1] if moves and moves[-1] else None
        record |= {"t": t, "adapter": adapter, "contraction": contraction}
        out.records.append(record)
        if step is not None:
            moves.append(step)
            change = record["relative_change"]
        parts.survival *= distances.pop("go_on", 1.0)
        distance = parts.survival if settings.criterion == "survival" else distances.get(settings.criterion)
        settled = settled + 1 if distance is not None and distance < settings.threshold else 0
        if t >= settings.min_iterations and settled >= settings.patience:
            out.exit_reason = "converged"
            break
    out.states = h
    t = len(h) - 1

    if t and parts.loop["decoder"]["answers"] == "latent_decoder":
        memory = torch.cat(h[1:]) if kind == "append" else h[-1]
        out.tokens = parts.decode_latent(memory, parts.answer_prefix, max_new_tokens)
        return out

    # After it: the closing pass, the answer prefix, the tokens. Nothing but the base, where t = 0.
    decode = "decode" if t and "decode" in parts.names else None
    at = {"append": P + t, "block": P + (len(h[0]) if t else 0), "prompt": P}[kind]
    if kind == "append":
        state = h[-1][0]
    elif kind == "block" and t:
        state = run(feed(h[-1], t + 1), P, decode, cache)[-1]
    elif kind == "prompt":
        state = run(parts.project(h[-1]) if t else h[0], 0, decode, cache)[-1]
    feed = parts.answer_prefix
    while True:
        if feed:
            state = run(tokens_in(feed), at, decode, cache)[-1]
            at += len(feed)
        logits = parts.head(state)
        logits[parts.suppressed] = -math.inf
        feed = [int(logits.argmax())]
        out.tokens += feed
        if len(out.tokens) == max_new_tokens or feed[0] == parts.eos:
            return out


def derive_token(parts, out, prompt, settings, max_new_tokens):
    """Run one request in the workspace ``token``: a cache per iteration, or one, and a loop for every position."""
    T, shared = settings.max_iterations, parts.loop["deeper_cache"] == "shared"
    plain, caches = DynamicCache(), [DynamicCache() for _ in range(T)]
    fed, at, reasons = prompt, 0, set()
    while True:
        inputs = parts.table[torch.tensor(fed)]
        if T == 0:
            state, t = parts.run(out.passes, inputs, at, None, plain)[-1], 0
            reasons.add("max_iterations")
        else:
            h, seen, settled, left, moves = [inputs], [], 0, None, []
            parts.survival = 1.0
            # A prompt runs all iterations, and is read at its exit.
            while len(h) <= T and (left is None or at == 0):
                t = len(h)
                u = parts.timestep(parts.project(h[-1]), t, None)
                if t > 1 and parts.wpe is not None and parts.loop["feedback"] == "raw":
                    u = u - parts.wpe.weight[at : at + len(u)]  # transformers adds it in every pass
                if shared and at:
                    caches_after = clone(caches[-1])
                    g = parts.run(out.passes, u, at, parts.adapter(t), caches_after)
                else:
                    g = parts.run(out.passes, u, at, parts.adapter(t), caches[t - 1])
                h.append(parts.residual(g, h[-1], h[0]))
                if left is not None:
                    continue
                record, distances = parts.measure([x[-1:] for x in h], g[-1:], is_state=t > 1)
                step = record.pop("step")
                contraction = step / moves[-1] if moves and moves[-1] else None
                moves += [] if step is None else [step]
                seen.append(record | {"t": t, "adapter": parts.adapter(t), "contraction": contraction})
                parts.survival *= distances.pop("go_on", 1.0)
                distance = parts.survival if settings.criterion == "survival" else distances.get(settings.criterion)
                settled = settled + 1 if distance is not None and distance < settings.threshold else 0
                if t >= settings.min_iterations and settled >= settings.patience:
                    left = t
            reasons.add("max_iterations" if left is None else "converged")
            t = T if left is None else left
            state = h[t][-1]
            if at == 0:
                out.states, out.records = [x[-1:] for x in h[: t + 1]], seen
            elif shared:
                caches[-1] = caches_after
            else:
                for cache in caches[t:]:
                    for index, layer in enumerate(caches[t - 1].layers):
                        cache.update(layer.keys[..., -1:, :], layer.values[..., -1:, :], index)
        if at == 0 and T == 0:
            out.states = [inputs[-1:]]
        at += len(fed)
        out.iterations_per_token.append(t)
        logits = parts.read(state)
        logits[parts.suppressed] = -math.inf
        fed = [int(logits.argmax())]
        out.tokens += fed
        if len(out.tokens) == max_new_tokens or fed[0] == parts.eos:
            out.exit_reason = "max_iterations" if "max_iterations" in reasons else "converged"
            return out


class Parts:
    """The parts of a checkpoint, each a few lines of arithmetic over its saved tensors."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "slr_config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.loop, self.eos = config["loop"], tokenizer.eos_token_id
        prefix = config["text"]["answer_prefix"]
        self.suppressed = config["text"]["suppressed_token_ids"]
        self.answer_prefix = tokenizer(prefix).input_ids if prefix else []
        self.w = load_file(folder / "slr_modules.safetensors")
        self.names = sorted(path.name for path in folder.glob("loops/*"))
        model = plain_base(folder)
        self.head, self.table = model.get_output_embeddings(), model.get_input_embeddings().weight
        self.survival = 1.0
        inner = model.base_model
        self.wpe = getattr(inner, "wpe", None)
        self.norm = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
        self.model = with_peft(model, folder, self.names) if self.names else model

    def run(self, passes, inputs, first, adapter, cache):
        """One pass over inputs ``[q, d]`` from position id ``first`` on: the states after the final norm."""
        positions = list(range(first, first + len(inputs)))
        if adapter is None and self.loop["lora"]["covers"] == "all":
            adapter = "loop_01"
        passes.append((adapter, positions))
        options = {
            "inputs_embeds": inputs[None],
            "position_ids": torch.tensor([positions]),
            "past_key_values": cache,
            "use_cache": True,
            "output_hidden_states": True,
        }
        before_norm = []
        handle = self.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
        if adapter is None and self.names:
            with self.model.disable_adapter():
                output = self.model(**options)
        else:
            if adapter is not None:
                self.model.set_adapter(adapter)
            output = self.model(**options)
        handle.remove()
        return before_norm[0][0] if self.loop["feedback"] == "raw" else output.hidden_states[-1][0]

    def read(self, state):
        """Logits at a state."""
        return self.head(self.norm(state) if self.loop["feedback"] == "raw" else state)

    def trained(self, t):
        """The trained iteration that serves iteration ``t``."""
        count, policy = self.loop["trained_iterations"], self.loop["lora"]["past_end"]
        assert policy != "error" or t <= count
        return (t - 1) % count + 1 if policy == "cycle" else min(t, count)

    def adapter(self, t):
        kind = self.loop["lora"]["kind"]
        return {"none": None, "shared": "loop_01"}.get(kind, f"loop_{self.trained(t):02d}")

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def layer_norm(self, name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def project(self, h):
        match self.loop["projection"]["kind"]:
            case "identity":
                return h
            case "rms_match":
                return rms_normalize(h) * (self.table**2).mean().sqrt()
            case "expected_embedding":
                logits = self.head(h)
                count = self.loop["projection"]["top_tokens"]
                kept = logits >= logits.sort(-1, descending=True).values[..., count - 1 : count]
                return logits.masked_fill(~kept, float("-inf")).softmax(-1) @ self.table
            case "linear":
                return self.linear("project.layers", h)
            case "mlp":
                x = gelu(self.linear("project.layers.0", h))
                x = self.linear("project.layers.2", x)
                return self.layer_norm("project.layers.3", x) if self.loop["projection"]["norm"] else x

    def timestep(self, x, t, change):
        config, e = self.loop["timestep"], torch.zeros_like(x[0])
        if config["kind"] == "none" and not config["noise_level"]:
            return x
        if config["kind"] == "learned":
            e = self.w["timestep.table"][self.trained(t) - 1]
        elif config["kind"] == "sinusoidal":
            half = len(e) // 2
            angles = self.trained(t) * 10_000.0 ** (-torch.arange(half) / half)
            e = silu(self.linear("timestep.mlp.0", torch.cat([angles.sin(), angles.cos()]).to(x.dtype)))
            e = self.linear("timestep.mlp.2", e)
        if config["noise_level"]:
            level = self.w["timestep.first_level"] if change is None else torch.tensor(math.log(change)).to(x.dtype)
            e = e + self.linear("timestep.level_mlp.2", silu(self.linear("timestep.level_mlp.0", level[None])))
        return (
            x + e if config["combine"] == "add" else self.linear("timestep.merge", torch.cat([x, e.expand_as(x)], -1))
        )

    def residual(self, g, previous, initial):
        config = self.loop["residual"]
        s = {"none": None, "previous": previous, "initial": initial}[config["source"]]
        if s is None:
            h = g
        elif config["mix"] == "add":
            h = g + config["scale"] * s
        else:
            alpha = self.w["residual.gate"].sigmoid() if config["mix"] == "gated" else config["alpha"]
            h = alpha * g + (1 - alpha) * s
        return rms_normalize(h) * self.w["residual.weight"] if config["norm"] else h

    def measure(self, h, g, *, is_state):
        """A record of the newest state, and the value of every criterion; ``is_state``: whether the one before is."""
        now, before = h[-1].flatten().float(), h[-2].flatten().float()
        moved = g.flatten().float() if self.loop["residual"]["source"] == "previous" else now
        # The first token is read at the workspace's last position.
        log_p, log_q = (self.read(x[-1]).float().log_softmax(-1) for x in (h[-2], h[-1]))
        entropy = lambda log: -float((log.exp() * log).sum())  # noqa: E731
        record = {"norm": float(now.norm()), "entropy": entropy(log_q), "step": None}
        record |= dict.fromkeys(("relative_change", "cosine", "kl"))
        go_on = 1.0
        if self.loop["halting_head"]:
            go_on -= float(self.linear("halting.probe", h[-1].mean(0)).sigmoid())
        end_token = self.loop["convergence"]["end_token_id"]
        distances = {"go_on": go_on}
        if end_token is not None:
            distances["end_token"] = 1 - float(log_q[end_token].exp())
        if not is_state:
            return record, distances
        record["step"] = float((moved - before).norm())
        record["relative_change"] = record["step"] / float(before.norm())
        record["cosine"] = 1 - float(moved @ before / (moved.norm() * before.norm()))
        record["kl"] = float((log_p.exp() * (log_p - log_q)).sum())
        distances |= {name: record[name] for name in ("relative_change", "cosine", "kl")}
        distances["entropy_change"] = abs(record["entropy"] - entropy(log_p))
        distances["argmax_stable"] = float(log_p.argmax() != log_q.argmax())
        if self.loop["halting_head"]:
            distances["learned"] = go_on
        return record, distances

    def thought(self, h):
        """The words of one iteration's state, as tokens; none without a latent decoder."""
        return self.decode_latent(h, [], self.loop["decoder"]["latent_decoder"]["max_thought_tokens"])

    def decode_latent(self, memory, prefix, count):
        """Tokens that the latent decoder writes after ``prefix`` when it reads states ``[S, d]``."""
        config, tokens = self.loop["decoder"]["latent_decoder"], []
        read = self.linear("decoder.read", rms_normalize(memory))
        read = read + waves(len(memory), read)
        while len(tokens) < count and self.eos not in tokens:
            embeds = self.linear("decoder.embed", rms_normalize(self.table[torch.tensor([*prefix, *tokens]).long()]))
            x = torch.cat([self.w["decoder.start"][None], embeds])
            x = x + waves(len(x), x)
            for i in range(config["layers"]):
                name = f"decoder.layers.{i}"
                y = self.layer_norm(f"{name}.norm1", x)
                x = x + self.attention(f"{name}.self_attn", y, y, causal=True)
                x = x + self.attention(f"{name}.multihead_attn", self.layer_norm(f"{name}.norm2", x), read)
                y = gelu(self.linear(f"{name}.linear1", self.layer_norm(f"{name}.norm3", x)))
                x = x + self.linear(f"{name}.linear2", y)
            state = self.linear("decoder.write", self.layer_norm("decoder.norm", x[-1]))
            tokens.append(int(self.head(state).argmax()))
        return tokens

    def attention(self, name, x, memory, causal=False):
        q, k, v = (
            (y @ weight.T + bias).unflatten(-1, (self.loop["decoder"]["latent_decoder"]["heads"], -1)).transpose(0, 1)
            for y, weight, bias in zip(
                (x, memory, memory),
                self.w[f"{name}.in_proj_weight"].chunk(3),
                self.w[f"{name}.in_proj_bias"].chunk(3),
                strict=True,
            )
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.linear(f"{name}.out_proj", mixed.transpose(0, 1).flatten(-2))


def rms_normalize(x):
    return x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt()


def waves(count, like):
    half = like.shape[-1] // 2
    angles = torch.arange(count)[:, None] * math.e ** (-9.0 * torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)
