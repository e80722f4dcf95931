"""The rows of parts from their equations, with loops, reading the rows that they name from a cache: for the tests of any
architecture that has the part.

Each writes into `out`, by names relative to the block; `c(name)` is what the cache holds under such a name.
"""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, projection) -> torch.Tensor:
    """x W^T + b, b as there is one."""
    return x @ projection.weight.T + (0 if projection.bias is None else projection.bias)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def norm_rows(out, c, part: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    out[f"{part}.hook_scale"] = rms(x, eps)
    out[f"{part}.hook_normalized"] = x / c(f"{part}.hook_scale")
    out[f"{part}.hook_out"] = weight * c(f"{part}.hook_normalized")


def norm(out, c, part, weights, x, eps) -> None:
    """The rows of a norm: an RMSNorm, or, of weights with a bias, a LayerNorm."""
    bias = dict(weights.named_parameters()).get("bias")
    norm_rows(out, c, part, x if bias is None else x - x.mean(-1, keepdim=True), weights.weight, eps)
    if bias is not None:
        out[f"{part}.hook_out"] = out[f"{part}.hook_out"] + bias


def before(x):
    """Each position's predecessor, 0 at the first."""
    shift = torch.zeros_like(x)
    for t in range(1, x.shape[1]):
        shift[:, t] = x[:, t - 1]
    return shift


def conv_taps(x, weight):
    """The summands of a causal depthwise convolution: [b, l, ..., tap] of x [b, l, ...] and weight [c, 1, tap]."""
    flat, K = x.flatten(2), weight.shape[-1]
    taps = torch.zeros(*flat.shape, K, dtype=x.dtype)
    for t in range(x.shape[1]):
        for k in range(max(0, K - 1 - t), K):
            taps[:, t, :, k] = weight[:, 0, k] * flat[:, t - (K - 1) + k]
    return taps.unflatten(2, x.shape[2:])


def convolved(out, c, weight, streams):
    """streams: the convolution's name, the row it reads, and the shape of a position, one behind the other in `weight`."""
    first = 0
    for name, before, shape in streams:
        x = c(f"mixer.hook_{before}").flatten(2)
        width = x.shape[-1]
        taps = conv_taps(x, weight[first : first + width])
        out[f"mixer.hook_{name}conv_taps"] = taps.unflatten(2, shape)
        out[f"mixer.hook_{name}conv"] = c(f"mixer.hook_{name}conv_taps").sum(-1)
        first += width


def delta_rule(out, c, cfg, groups, A_log, by_key=False, beta=1.0):
    """A delta net from its convolution to its scan, a head at a time; its decay is a number, or one for each of a key's."""
    H, V, N = (cfg.sizes[axis] for axis in ("head", "value", "state"))
    batch, length = c("mixer.hook_u").shape[:2]
    convolution = c("mixer.hook_conv")
    out["mixer.hook_u"] = silu(convolution)
    for name in "qk":
        act = silu(c(f"mixer.hook_{name}_conv"))
        out[f"mixer.hook_{name}"] = act / (act.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    out["mixer.hook_beta"] = beta / (1 + torch.exp(-c("mixer.hook_beta_pre")))
    out["mixer.hook_dt"] = torch.log1p(torch.exp(c("mixer.hook_dt_pre")))
    rates = [-torch.exp(A_log.flatten()[h]) * c("mixer.hook_dt")[:, :, h] for h in range(H)]
    out["mixer.hook_log_decay"] = torch.stack(rates, 2)
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    out["mixer.hook_state_start"] = torch.zeros(batch, H, V, N, dtype=torch.float64)
    decay, write, erase = (torch.zeros(batch, length, H, V, N, dtype=torch.float64) for _ in range(3))
    probe = torch.zeros(batch, length, H, N, dtype=torch.float64)
    scan = torch.zeros(batch, length, H, V, dtype=torch.float64)
    for h in range(H):
        g = h // (H // groups)
        log = c("mixer.hook_log_decay")[:, :, h]
        kept = torch.exp(log if by_key else log.unsqueeze(-1)) * (1 - c("mixer.hook_reset"))
        k, strength = c("mixer.hook_k")[:, :, g], c("mixer.hook_beta")[:, :, h, None]
        u = c("mixer.hook_u").reshape(batch, length, H, V)[:, :, h]
        decay[:, :, h] = kept[..., None, :]
        write[:, :, h] = u[..., :, None] * (strength * k)[..., None, :]
        erase[:, :, h] = (strength * k)[..., None, :]
        probe[:, :, h] = kept * k
        read = c("mixer.hook_q")[:, :, g] / N**0.5
        scan[:, :, h] = (c("mixer.hook_state")[:, :, h] * read[:, :, None]).sum(-1)
    out["mixer.hook_decay"], out["mixer.hook_write"] = decay, write
    out["mixer.hook_erase"], out["mixer.hook_probe"] = erase, probe
    state, states = c("mixer.hook_state_start"), []
    for t in range(length):
        found = (c("mixer.hook_probe")[:, t, :, None] * state).sum(-1, keepdim=True)
        state = c("mixer.hook_decay")[:, t] * state - c("mixer.hook_erase")[:, t] * found + c("mixer.hook_write")[:, t]
        states.append(state)
    out["mixer.hook_state"] = torch.stack(states, dim=1)
    out["mixer.hook_scan"] = scan.flatten(2)
    out["mixer.hook_y"] = c("mixer.hook_scan")


def normed_and_gated(out, c, cfg, weight, eps, gate, projection):
    """What stands behind the scan of a delta net: its norm head by head, its gate, the output projection."""
    by_head = c("mixer.hook_y").unflatten(2, (cfg.sizes["head"], -1))
    out["mixer.hook_scale"] = rms(by_head, eps).squeeze(-1)
    out["mixer.hook_normed"] = (weight * by_head / c("mixer.hook_scale")[..., None]).flatten(2)
    out["mixer.hook_gate"] = gate(c("mixer.hook_gate_pre"))
    out["mixer.hook_gated"] = c("mixer.hook_normed") * c("mixer.hook_gate")
    out["hook_mixer_out"] = c("mixer.hook_gated") @ projection.weight.T


def mamba2(out, c, m, given: torch.Tensor, sizes, limit, eps: float, place: str) -> None:
    """A Mamba-2 mixer up to what out_proj reads. given: what in_proj gives; place: where its norm is."""
    batch, length, channels = c("mixer.hook_x").shape
    H, V, G, N = (sizes[name] for name in ("head", "value", "group", "state"))
    cuts = [channels, 2 * channels, 2 * channels + G * N, 2 * channels + 2 * G * N]
    out["mixer.hook_gate_pre"], out["mixer.hook_x"] = given[..., : cuts[0]], given[..., cuts[0] : cuts[1]]
    out["mixer.hook_B_pre"] = given[..., cuts[1] : cuts[2]].reshape(batch, length, G, N)
    out["mixer.hook_C_pre"] = given[..., cuts[2] : cuts[3]].reshape(batch, length, G, N)
    out["mixer.hook_dt_pre"] = given[..., cuts[3] :] + m.dt_bias
    bias = torch.zeros(channels + 2 * G * N, dtype=torch.float64) if m.conv1d.bias is None else m.conv1d.bias
    out["mixer.hook_conv_taps"] = conv_taps(c("mixer.hook_x"), m.conv1d.weight[:channels])
    out["mixer.hook_conv"] = c("mixer.hook_conv_taps").sum(-1) + bias[:channels]
    out["mixer.hook_u"] = silu(c("mixer.hook_conv"))
    for name, some in (("B", slice(channels, channels + G * N)), ("C", slice(channels + G * N, None))):
        taps = conv_taps(c(f"mixer.hook_{name}_pre").flatten(2), m.conv1d.weight[some])
        out[f"mixer.hook_{name}_conv_taps"] = taps.reshape(batch, length, G, N, -1)
        out[f"mixer.hook_{name}_conv"] = c(f"mixer.hook_{name}_conv_taps").sum(-1) + bias[some].reshape(G, N)
        out[f"mixer.hook_{name}"] = silu(c(f"mixer.hook_{name}_conv"))
    out["mixer.hook_dt"] = torch.log1p(torch.exp(c("mixer.hook_dt_pre"))).clamp(*limit)
    A, u = -torch.exp(m.A_log), c("mixer.hook_u").reshape(batch, length, H, V)
    D = m.D.repeat_interleave(V) if len(m.D) == H else m.D
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=torch.float64)
    out["mixer.hook_state_start"] = torch.zeros(batch, H, V, N, dtype=torch.float64)
    decay, write = (torch.zeros(batch, length, H, V, N, dtype=torch.float64) for _ in range(2))
    scan = torch.zeros(batch, length, H, V, dtype=torch.float64)
    for h in range(H):
        g = h // (H // G)
        kept = torch.exp(c("mixer.hook_dt")[:, :, h] * A[h]) * (1 - c("mixer.hook_reset")[..., 0])
        decay[:, :, h] = kept[..., None, None]
        value = c("mixer.hook_dt")[:, :, h, None] * u[:, :, h]
        write[:, :, h] = value[..., :, None] * c("mixer.hook_B")[:, :, g, None, :]
        scan[:, :, h] = (c("mixer.hook_state")[:, :, h] * c("mixer.hook_C")[:, :, g, None]).sum(-1)
    out["mixer.hook_decay"], out["mixer.hook_write"] = decay, write
    state, states = c("mixer.hook_state_start"), []
    for t in range(length):
        state = c("mixer.hook_decay")[:, t] * state + c("mixer.hook_write")[:, t]
        states.append(state)
    out["mixer.hook_state"] = torch.stack(states, dim=1)
    out["mixer.hook_scan"] = scan.flatten(2)
    out["mixer.hook_y"] = c("mixer.hook_scan") + D * c("mixer.hook_u")
    out["mixer.hook_gate"] = silu(c("mixer.hook_gate_pre"))

    def scale_of(x):
        return rms(x.reshape(batch, length, G, -1), eps).squeeze(-1)

    def normed(x):
        scale = c("mixer.hook_scale")[..., None]
        return m.norm.weight * (x.reshape(batch, length, G, -1) / scale).reshape(batch, length, channels)

    if place == "after the gate":
        out["mixer.hook_product"] = c("mixer.hook_y") * c("mixer.hook_gate")
        out["mixer.hook_scale"] = scale_of(c("mixer.hook_product"))
        out["mixer.hook_gated"] = normed(c("mixer.hook_product"))
    elif place == "before the gate":
        out["mixer.hook_scale"] = scale_of(c("mixer.hook_y"))
        out["mixer.hook_normed"] = normed(c("mixer.hook_y"))
        out["mixer.hook_gated"] = c("mixer.hook_normed") * c("mixer.hook_gate")
    else:
        out["mixer.hook_gated"] = c("mixer.hook_y") * c("mixer.hook_gate")


def turned(x: torch.Tensor, width: int, theta: float) -> torch.Tensor:
    """The first `width` of each head turned by position, a pair at a time; its frequencies are rounded to float32."""
    out = x.clone()
    for j in range(width // 2):
        frequency = (1.0 / torch.tensor(theta) ** (torch.tensor(2 * j) / width)).double()
        for t in range(x.shape[1]):
            angle, a, b = t * frequency, x[:, t, :, j], x[:, t, :, j + width // 2]
            out[:, t, :, j] = a * angle.cos() - b * angle.sin()
            out[:, t, :, j + width // 2] = b * angle.cos() + a * angle.sin()
    return out


def attention(
    out, c, m, n: torch.Tensor, d_head: int, rotary: int = 0, keys: float = 1.0, scores: float | None = None,
    theta: float = 10000.0,
) -> None:  # fmt: skip
    """An attention up to what o_proj reads. n: what it reads; rotary: how many of a head are turned."""
    batch, length = n.shape[:2]

    def heads(projection):
        return linear(n, projection).reshape(batch, length, -1, d_head)

    out["attn.hook_q"], out["attn.hook_k"], out["attn.hook_v"] = (
        heads(m.q_proj),
        heads(m.k_proj) * keys,
        heads(m.v_proj),
    )
    names = {"q": "hook_q", "k": "hook_k"}
    for name in "qk" if rotary else "":
        out[f"attn.hook_rot_{name}"] = turned(c(f"attn.hook_{name}"), rotary, theta)
        names[name] = f"hook_rot_{name}"
    q, k = c(f"attn.{names['q']}"), c(f"attn.{names['k']}")
    H, G = q.shape[2], k.shape[2]
    found = torch.full((batch, H, length, length), -torch.inf, dtype=torch.float64)
    z = torch.zeros_like(q)
    for h in range(H):
        g = h // (H // G)
        for i in range(length):
            for j in range(i + 1):
                found[:, h, i, j] = (q[:, i, h] * k[:, j, g]).sum(-1) * (d_head**-0.5 if scores is None else scores)
            for j in range(length):
                z[:, i, h] += c("attn.hook_pattern")[:, h, i, j, None] * c("attn.hook_v")[:, j, g]
    out["attn.hook_attn_scores"], out["attn.hook_z"] = found, z
    out["attn.hook_pattern"] = torch.softmax(c("attn.hook_attn_scores"), -1)


def gated_mlp(out, c, m, read: torch.Tensor, place: str = "mlp", gate: float = 1.0) -> None:
    """A gated MLP up to what down_proj reads."""
    out[f"{place}.hook_pre"] = gate * linear(read, m.gate_proj)
    out[f"{place}.hook_pre_linear"] = linear(read, m.up_proj)
    out[f"{place}.hook_post"] = silu(c(f"{place}.hook_pre")) * c(f"{place}.hook_pre_linear")


def mlp(out, c, m, read, into="hook_mlp_out"):
    """A gated MLP with its output."""
    gated_mlp(out, c, m, read)
    out[into] = c("mlp.hook_post") @ m.down_proj.weight.T


def fused_mlp(out, c, m, read: torch.Tensor, place: str = "mlp") -> None:
    """The same of a matrix whose first half is the gate."""
    both = linear(read, m.input_linear)
    width = both.shape[-1] // 2
    out[f"{place}.hook_pre"], out[f"{place}.hook_pre_linear"] = both[..., :width], both[..., width:]
    out[f"{place}.hook_post"] = silu(c(f"{place}.hook_pre")) * c(f"{place}.hook_pre_linear")


def relu_squared_mlp(out, c, m, read: torch.Tensor, place: str = "mlp") -> None:
    """A plain MLP of max(x, 0)^2."""
    out[f"{place}.hook_pre"] = linear(read, m.up_proj)
    out[f"{place}.hook_post"] = c(f"{place}.hook_pre").clamp(min=0) ** 2


def chosen(shares: torch.Tensor, choice: torch.Tensor, k: int, normalised: bool) -> torch.Tensor:
    """`shares` of the k experts whose `choice` is largest, 0 for the others, a position at a time."""
    weights = torch.zeros_like(shares)
    for b in range(shares.shape[0]):
        for t in range(shares.shape[1]):
            top = sorted(range(shares.shape[-1]), key=lambda e: -choice[b, t, e])[:k]
            whole = sum(shares[b, t, e] for e in top) if normalised else 1
            for e in top:
                weights[b, t, e] = shares[b, t, e] / whole
    return weights


def experts(out, c, m, read: torch.Tensor) -> None:
    """Every expert: gated, the gate's rows first, or plain with max(x, 0)^2 where there is no gate."""
    if "gate_up_proj" in m._parameters:
        up, width = m.gate_up_proj, m.down_proj.shape[2]
        out["mlp.experts.hook_pre"] = torch.stack([read @ each[:width].T for each in up], 2)
        out["mlp.experts.hook_pre_linear"] = torch.stack([read @ each[width:].T for each in up], 2)
        out["mlp.experts.hook_post"] = silu(c("mlp.experts.hook_pre")) * c("mlp.experts.hook_pre_linear")
    else:
        out["mlp.experts.hook_pre"] = torch.stack([read @ each.T for each in m.up_proj], 2)
        out["mlp.experts.hook_post"] = c("mlp.experts.hook_pre").clamp(min=0) ** 2
    post = c("mlp.experts.hook_post")
    out["mlp.hook_experts"] = torch.stack([post[:, :, e] @ down.T for e, down in enumerate(m.down_proj)], 2)


def experts_by_groups(out, c, m, cfg) -> None:
    """Experts and a shared one: of the groups whose two best experts are best together, the best; the choice has a correction,
    the weight has none."""
    read, total = c("ln2.hook_out"), cfg.n_experts
    out["mlp.hook_router"] = read @ m.gate.weight.T
    shares = torch.sigmoid(c("mlp.hook_router"))
    weights, size = torch.zeros_like(shares), total // cfg.n_expert_groups
    for b in range(shares.shape[0]):
        for t in range(shares.shape[1]):
            choice = (shares[b, t] + m.gate.e_score_correction_bias).tolist()
            best = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(cfg.n_expert_groups)}
            kept = sorted(best, key=lambda g: -best[g])[: cfg.n_groups_per_token]
            some = [e for e in range(total) if e // size in kept]
            best_of_them = sorted(some, key=lambda e: -choice[e])[: cfg.n_experts_per_token]
            whole = sum(shares[b, t, e] for e in best_of_them) if cfg.normalised_weights else 1
            for e in best_of_them:
                weights[b, t, e] = cfg.weights_scale * shares[b, t, e] / whole
    out["mlp.hook_expert_weights"] = weights
    experts(out, c, m.experts, read)
    gated_mlp(out, c, m.shared_experts, read, place="mlp.shared")
    out["hook_mlp_out"] = of_experts(c) + linear(c("mlp.shared.hook_post"), m.shared_experts.down_proj)


def of_experts(c) -> torch.Tensor:
    """The sum over experts."""
    return (c("mlp.hook_expert_weights")[..., None] * c("mlp.hook_experts")).sum(2)


def around(out, c, cache, layer: int, groups: tuple[tuple[str, ...], ...]) -> None:
    """The rows of the residual stream in a block: its branches by name, those in a tuple parallel."""
    names = ["resid_pre", *(["resid_mid"] if len(groups) == 2 else []), "resid_post"]
    if layer > 0:
        out["hook_resid_pre"] = cache["resid_post", layer - 1]
    for before, after, group in zip(names, names[1:], groups, strict=False):
        for name in group:
            out[f"hook_{name}_in"] = c(f"hook_{before}")
            if "shared.hook_out" in out:  # what a block before the mixer gives is in what it reads, and in no stream
                out[f"hook_{name}_in"] = c(f"hook_{before}") + c("shared.hook_out")
        out[f"hook_{after}"] = c(f"hook_{before}") + sum(c(f"hook_{name}_out") for name in group)


def recurrence(out, c, decay, u, key, erase=None, probe=None) -> None:
    """The rows between hook_reset and hook_state: decay, erase and probe without the reset, which is put in here.

    decay [b, l, h, n] or [b, l, h, 1], u [b, l, h, v], key, erase and probe [b, l, h, n].
    """
    batch, length, heads, values = u.shape
    whole = (batch, length, heads, values, key.shape[-1])
    kept = 1 - c("mixer.hook_reset")[..., None]
    out["mixer.hook_reset"] = torch.zeros(batch, length, 1, dtype=u.dtype)
    out["mixer.hook_state_start"] = torch.zeros(batch, heads, values, whole[-1], dtype=u.dtype)
    out["mixer.hook_decay"] = (decay * kept).unsqueeze(-2).expand(whole)
    out["mixer.hook_write"] = torch.einsum("blhv,blhk->blhvk", u, key)
    if erase is not None:
        out["mixer.hook_erase"] = erase.unsqueeze(-2).expand(whole)
        out["mixer.hook_probe"] = probe * kept
    states = []
    for t in range(length):
        last = c("mixer.hook_state")[:, t - 1] if t else c("mixer.hook_state_start")
        state = c("mixer.hook_decay")[:, t] * last + c("mixer.hook_write")[:, t]
        if erase is not None:
            found = torch.einsum("bhvk,bhk->bhv", last, c("mixer.hook_probe")[:, t])
            state = state - found.unsqueeze(-1) * c("mixer.hook_erase")[:, t]
        states.append(state)
    out["mixer.hook_state"] = torch.stack(states, 1)
