"""The published loops once more: plain calls of transformers, no cache, one request, nothing of ``slr_core``."""

import torch


@torch.inference_mode()
def states(model, embeds):
    """States ``[q, d]`` after the final norm of inputs ``[q, d]``."""
    return model(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states[-1][0]


@torch.inference_mode()
def write(model, embeds, prefix, count, end, never=()):
    """Greedy tokens after inputs ``[q, d]`` and ids ``prefix``, to the id ``end``; ``never`` is not chosen."""
    table, head, tokens = model.get_input_embeddings().weight, model.get_output_embeddings(), []
    while len(tokens) < count and end not in tokens:
        fed = table[torch.tensor([*prefix, *tokens], dtype=torch.long)]
        logits = head(states(model, torch.cat([embeds, fed]))[-1])
        logits[list(never)] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


@torch.inference_mode()
def refined(model, prompt, vector, latents, loops):
    """Inputs ``[P + latents, d]`` of LOTUS' last pass, and the states ``[loops + 1, latents, d]`` of its passes."""
    question, passes = model.get_input_embeddings().weight[torch.tensor(prompt)], []
    inputs = vector.expand(latents, -1)
    for _ in range(loops + 1):
        embeds = torch.cat([question, inputs])
        passes.append(states(model, embeds)[len(prompt) :])
        inputs = vector + passes[-1]
    return embeds, torch.stack(passes)


@torch.inference_mode()
def parallel(model, prompt, vector, latents, iterations, project=lambda h: h):
    """Inputs ``[P + latents, d]`` of the last pass of PCCoT, and the states ``[iterations + 1, latents, d]``."""
    question, passes = model.get_input_embeddings().weight[torch.tensor(prompt)], []
    inputs = vector.expand(latents, -1)
    for _ in range(iterations + 1):
        embeds = torch.cat([question, inputs])
        found = states(model, embeds)
        passes.append(found[len(prompt) :])
        inputs = project(found[len(prompt) - 1 : -1])
    return embeds, torch.stack(passes)


@torch.inference_mode()
def chain(model, prompt, latents, project=lambda h: h):
    """Inputs of prompt and thoughts ``[P + latents, d]``: each thought is the projected state before it."""
    embeds = model.get_input_embeddings().weight[torch.tensor(prompt)]
    for _ in range(latents):
        embeds = torch.cat([embeds, project(states(model, embeds)[-1:])])
    return embeds
