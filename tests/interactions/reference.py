"""Indicators written as loops in NumPy float64, straight from METHOD: slow and obvious."""

import numpy as np


def attention(weights, **_):
    return weights.mean(0)


def dispersion(weights, **_):
    return np.sqrt(((weights - weights.mean(0)) ** 2).mean(0))


def value_norm(weights, values, out_kernel, **_):
    heads, tokens, _ = weights.shape
    result = np.zeros((tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            update = sum(weights[h, i, j] * values[j, h] @ out_kernel[h] for h in range(heads))
            result[i, j] = np.linalg.norm(update)
    return result


def gradient(weights, values, output_grad, **_):
    heads, tokens, _ = weights.shape
    result = np.zeros((tokens, tokens))
    for h in range(heads):
        for i in range(tokens):
            for j in range(tokens):
                slope = output_grad[i, h] @ values[j, h]
                result[i, j] += max(0.0, weights[h, i, j] * slope) / heads
    return result


def cut(weights, values, i, j):
    """Change of every head's output of token i when key j is masked: the softmax renormalised."""
    changes = np.zeros((weights.shape[0], values.shape[-1]))
    for h in range(weights.shape[0]):
        row = weights[h, i].copy()
        before = row @ values[:, h]
        row[j] = 0
        if row.sum() > 0:
            changes[h] = (row / row.sum()) @ values[:, h] - before
    return changes


def leave_one_out(weights, values, out_kernel, **_):
    tokens = weights.shape[-1]
    result = np.zeros((tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            moved = np.einsum("hk,hkd->hd", cut(weights, values, i, j), out_kernel)
            result[i, j] = np.sqrt((moved**2).sum())
    return result


def edge(weights, values, output_grad, signed=False, **_):
    tokens = weights.shape[-1]
    result = np.zeros((tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            result[i, j] = (output_grad[i] * cut(weights, values, i, j)).sum()
    return result if signed else np.abs(result)


def rollout(weights):
    """`weights` has a leading layer axis."""
    tokens = weights.shape[-1]
    product, layers = np.eye(tokens), []
    for layer in weights:
        mixed = 0.5 * layer.mean(0) + 0.5 * np.eye(tokens)
        product = (mixed / mixed.sum(1, keepdims=True)) @ product
        layers.append(product)
    return np.stack(layers)
