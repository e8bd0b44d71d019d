"""The llama architecture from a GGUF file in numpy, float64 throughout: what reference-forward.ts computes, fast enough for
thousands of tokens of a real model (about a minute for 2,300 tokens of SmolLM2-135M on two cores; it needs numpy only).

    python3 exact-forward.py MODEL.gguf < TOKENS.json > RESULT.json

TOKENS is a list of ids. RESULT has, for each position but the last: argmax, the most likely token after it; logprob, log p of
the token that does come; gap, log p of the most likely token less that of the second. Nothing is quantised but the weights.
"""

import json
import math
import struct
import sys

import numpy

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ROWS_AT_ONCE = 256  # of logits: [256, vocabulary] in float64 is 100 MB


def half(raw):
    return raw.copy().view("<f2").astype(numpy.float64)  # [blocks, 1]


def nibbles(raw):
    return numpy.concatenate([raw & 15, raw >> 4], axis=1).astype(numpy.float64)  # [blocks, 32]


def decode(kind, data, count):
    """Weights in float64 of a tensor's bytes."""
    if kind == 0:
        return data[: 4 * count].view("<f4").astype(numpy.float64)
    if kind == 1:
        return data[: 2 * count].view("<f2").astype(numpy.float64)
    size = {2: 18, 3: 20, 8: 34}[kind]
    blocks = data[: count // 32 * size].reshape(-1, size)
    scale = half(blocks[:, :2])
    if kind == 8:
        return (scale * blocks[:, 2:].copy().view(numpy.int8)).reshape(-1)
    if kind == 3:
        return (scale * nibbles(blocks[:, 4:]) + half(blocks[:, 2:4])).reshape(-1)
    return (scale * (nibbles(blocks[:, 2:]) - 8)).reshape(-1)


def read(path):
    data = numpy.fromfile(path, dtype=numpy.uint8)
    at = 8

    def number(form):
        nonlocal at
        size = struct.calcsize("<" + form)
        at += size
        return struct.unpack("<" + form, data[at - size : at].tobytes())[0]

    def text():
        nonlocal at
        size = number("Q")
        at += size
        return data[at - size : at].tobytes().decode()

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            element, count = number("I"), number("Q")
            return [value(element) for _ in range(count)]
        return number(SCALARS[kind])

    tensors, keys = number("Q"), number("Q")
    metadata = {}
    for _ in range(keys):
        key = text()
        metadata[key] = value(number("I"))
    infos = [(text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment

    def tensor(name):
        _, shape, kind, offset = next(info for info in infos if info[0] == name + ".weight")
        return decode(kind, data[start + offset :], math.prod(shape)).reshape(shape[::-1])  # [outputs, inputs]

    return metadata, tensor, {info[0] for info in infos}


def main(path, tokens):
    metadata, tensor, names = read(path)

    def key(name, default=None):
        return metadata.get("llama." + name, default)

    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv", key("attention.head_count"))
    head_dim = key("attention.key_length", key("embedding_length") // heads)
    rotary = key("rope.dimension_count", head_dim)
    epsilon = key("attention.layer_norm_rms_epsilon")
    count = len(tokens)
    angles = numpy.arange(count)[:, None] * key("rope.freq_base", 10000.0) ** (-numpy.arange(0, rotary, 2) / rotary)
    cos, sin = numpy.cos(angles)[:, None, :], numpy.sin(angles)[:, None, :]  # [count, 1, rotary / 2]
    future = numpy.triu(numpy.full((count, count), -numpy.inf), 1)

    def norm(x, weight):
        return x / numpy.sqrt((x * x).mean(axis=1, keepdims=True) + epsilon) * weight

    def rotate(x):  # [count, heads, head_dim], pairs (2i, 2i + 1)
        a, b = x[:, :, 0:rotary:2].copy(), x[:, :, 1:rotary:2].copy()
        x[:, :, 0:rotary:2] = a * cos - b * sin
        x[:, :, 1:rotary:2] = a * sin + b * cos
        return x

    embedding = tensor("token_embd")
    x = embedding[tokens]
    for layer in range(key("block_count")):
        prefix = f"blk.{layer}."
        h = norm(x, tensor(prefix + "attn_norm"))
        q = rotate((h @ tensor(prefix + "attn_q").T).reshape(count, heads, head_dim))
        k = rotate((h @ tensor(prefix + "attn_k").T).reshape(count, kv_heads, head_dim))
        v = (h @ tensor(prefix + "attn_v").T).reshape(count, kv_heads, head_dim)
        attended = numpy.empty((count, heads, head_dim))
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / math.sqrt(head_dim) + future
            weights = numpy.exp(scores - scores.max(axis=1, keepdims=True))
            attended[:, head] = weights @ v[:, kv] / weights.sum(axis=1, keepdims=True)
        x = x + attended.reshape(count, -1) @ tensor(prefix + "attn_output").T
        h = norm(x, tensor(prefix + "ffn_norm"))
        gate = h @ tensor(prefix + "ffn_gate").T
        x = x + (gate / (1 + numpy.exp(-gate)) * (h @ tensor(prefix + "ffn_up").T)) @ tensor(prefix + "ffn_down").T
        print(f"layer {layer}", file=sys.stderr)
    x = norm(x, tensor("output_norm"))
    head = tensor("output") if "output.weight" in names else embedding

    result = {"argmax": [], "logprob": [], "gap": []}
    for start in range(0, count - 1, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, count - 1)
        logits = x[start:stop] @ head.T
        most = logits.max(axis=1)
        log_sum = most + numpy.log(numpy.exp(logits - most[:, None]).sum(axis=1))
        rows = numpy.arange(stop - start)
        result["argmax"] += logits.argmax(axis=1).tolist()
        result["logprob"] += (logits[rows, tokens[start + 1 : stop + 1]] - log_sum).tolist()
        best = numpy.partition(logits, -2, axis=1)
        result["gap"] += (best[:, -1] - best[:, -2]).tolist()
    json.dump(result, sys.stdout)


main(sys.argv[1], json.load(sys.stdin))
