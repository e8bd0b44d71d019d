"""OpenVINO GenAI under `bench kernels`: orders come as lines of JSON, each is answered with one. See kernels-order.ts."""

import json
import os
import sys
import time

# Reports have the pipe for themselves: what libraries print goes to stderr.
reports = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import numpy
import openvino
import openvino_genai

pipeline = None
random = numpy.random.default_rng(1)


def generate(prompts, new_tokens):
    ids = numpy.array(prompts, dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    return pipeline.generate(inputs, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)


def timed(prompts, new_tokens):
    started = time.perf_counter()
    generate(prompts, new_tokens)
    return (time.perf_counter() - started) * 1000


def answer(order):
    global pipeline
    if order["type"] == "open":
        options = order["open"]
        started = time.perf_counter()
        pipeline = openvino_genai.LLMPipeline(options["path"], "CPU", INFERENCE_NUM_THREADS=options["threads"])
        generate([order["prompt"]], 1)
        return (time.perf_counter() - started) * 1000
    if order["type"] == "prefill":
        return timed([order["prompt"]], 1)
    if order["type"] == "decode":
        # Its own clock tells when the first tokens of all were there; what comes after is decoding.
        context = len(order["context"])
        prompts = random.integers(100, 10_000, (order["sequences"], context))
        metrics = generate(prompts, order["steps"] + 1).perf_metrics
        return metrics.get_generate_duration().mean - metrics.get_ttft().mean
    raise ValueError(f"{order['type']}: OpenVINO GenAI does not tell the log probabilities of a prompt")


for line in sys.stdin:
    try:
        report = {"type": "done", "value": answer(json.loads(line))}
    except Exception as error:  # told to who asked
        report = {"type": "failed", "message": f"OpenVINO GenAI: {error}"}
    reports.write(json.dumps(report) + "\n")
    reports.flush()
