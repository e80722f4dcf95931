"""What the literal equations of several architectures have in common: norms, a gated MLP, a convolution, a delta net.

Each puts rows into `out`, by their names in a block; `c(name)` reads the rows that an equation names from a cache.
"""

from __future__ import annotations

import torch


def rms(x, eps):
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x):
    return x * torch.sigmoid(x)


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def norm_rows(out, c, part, x, gain, eps):
    out[f"{part}.hook_scale"] = rms(x, eps)
    out[f"{part}.hook_normalized"] = x / c(f"{part}.hook_scale")
    out[f"{part}.hook_out"] = gain * c(f"{part}.hook_normalized")


def mlp(out, c, m, read, into="hook_mlp_out"):
    out["mlp.hook_pre"], out["mlp.hook_pre_linear"] = read @ m.gate_proj.weight.T, read @ m.up_proj.weight.T
    out["mlp.hook_post"] = silu(c("mlp.hook_pre")) * c("mlp.hook_pre_linear")
    out[into] = c("mlp.hook_post") @ m.down_proj.weight.T


def convolved(out, c, weight, streams):
    """streams: the convolution's name, the row it reads, and the shape of a position, one behind the other in `weight`."""
    first = 0
    for name, before, shape in streams:
        x = c(f"mixer.hook_{before}").flatten(2)
        (batch, length, width), K = x.shape, weight.shape[-1]
        taps = torch.zeros(batch, length, width, K, dtype=x.dtype)
        for t in range(length):
            for k in range(max(0, K - 1 - t), K):
                taps[:, t, :, k] = weight[first : first + width, 0, k] * x[:, t - (K - 1) + k]
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
