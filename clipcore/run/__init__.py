"""What a training run is made of; ``clipcore.train`` puts it together.

==================  ================================================================
``config.py``       the settings, which are the command line
``parts.py``        vocabulary, data and model, from the settings
``train_step.py``   a batch through towers, loss and gradients
``grad_cache.py``   a batch in micro-batches, with exact gradients
``memory_plan.py``  the size of a micro-batch, and how many graphs are kept
``threads.py``      how many threads of the CPU are faster
``sharding.py``     a model split among the ranks, or whole on each
``optim.py``        AdamW, clipping, the moving average
``schedule.py``     the learning rate of a step
``state.py``        what a run is between two steps: checkpoints, resume, folders
``metrics.py``      what a run writes down
``collapse.py``     notices a run that has collapsed
``verify.py``       compares a step with float64
``profile.py``      where the time of a step goes
``traffic.py``      bytes and FLOPs of every operator
``flops.py``        FLOPs of the operators that torch does not count
``ceilings.py``     what a device can do at most
``memory.py``       what memory is in use, free, and the peak of a piece of work
==================  ================================================================
"""
