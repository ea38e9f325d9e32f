"""The tuner: which configuration of the fold kernels suits a device and a set of shapes.

A `problem.Problem` is one call of a fold, the pairs of one group; `Problem.tuned_key` is what the launcher looks a
winner up by. A `space.Space` lists configurations. An `outcome.Evaluator` turns them into `Outcome`s: by compiled facts
and a cost model for a GPU that need not be there (`bench`), or by time (`device`).

    problem   problems_of_model(name, dtype)  problems_of_file(path)  problems_of_calls(calls)     -> list[Problem]
    space     QUICK, FULL, and .measured() of them for a device
              .configurations(p), the default first   .neighbours(p, c)   .excluded(p), with reasons
    bench     OfflineBench(arch, workers=2, timeout=60.0)     modelled us
    device    DeviceBench(device, timeout=60.0)               measured us
              .unit   .margin   .evaluate(p, configs)   .rerank(p, configs)   .close()             (config, Outcome)s

A winner takes the default's place only if its cost is below `(1 - margin)` of the default's.
"""
