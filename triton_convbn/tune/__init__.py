"""The tuner: which configuration of the fold kernels suits a device and a set of shapes.

A `problem.Problem` is one call of a fold, the pairs of one group; `Problem.tuned_key` is what the launcher looks a
winner up by. A `space.Space` lists configurations. A `bench.Evaluator` turns them into `bench.Outcome`s, on a GPU by
time or anywhere by compiled facts and `cost`.

    problems_of_model(name, dtype)  problems_of_file(path)  problems_of_calls(calls)       -> list[Problem]
    QUICK, FULL                     .configurations(p)  .neighbours(p, c)  .excluded(p)    the default comes first
    OfflineBench(arch, workers=2, timeout=60.0)   DeviceBench(device, timeout=60.0)        context managers
        .unit  .evaluate(p, configs)  .rerank(p, configs)  .close()                        -> (config, Outcome), any order
    kernels.spec.tuned_key(specs)   kernels.generate.launches_of(count, config)            what the launcher needs
"""
