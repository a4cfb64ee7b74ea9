"""One command for a bare GPU machine: facts, correctness, timings, tools and tuning tables within a total time.

``make gpu-first OUT=folder`` runs it. Every stage has its own process and time limit, so a hang, a crash or a broken
CUDA context costs that stage only. Every result is written when it is known, as a line of JSON in ``records.jsonl``;
``gpu-first.md`` is made from these lines, also from those of a run that was cut off.
"""
