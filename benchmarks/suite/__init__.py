"""The benchmark suite: ours and the published peers, on the same inputs and weights, in the same run.

    python benchmarks/suite/peers/install.py                     # once: the peers' own environment
    python benchmarks/suite/run.py                               # every case, a table and a JSON file
    python benchmarks/suite/run.py --cases 'modal*' --rounds 3   # some of them
    python benchmarks/suite/run.py --document                    # also the tables and plots of docs/benchmarks.md

How it is put together, from the outside in:

    command.py    options, the order of cases, what is written where
    registry.py   all cases; ``cases/`` lists them by kind
    case.py       the words: Case, Side, Gate, Goal
    measure.py    one case: answers, gate, then rounds that alternate between the sides
    process.py    a side's process, as the parent sees it;  worker.py  the process itself
    gate.py       are the answers right?
    task.py       what a worker runs;  steps.py  what adapters of both sides share
    ours/         what our side of a case runs;  peers/  what the others run
    inputs.py     what all sides get;  models.py  configurations;  truth.py  answers in float64, from the formulas
    report.py     tables, from the result file;  page.py  docs/benchmarks.md and its plots
"""
