"""What a training run is made of; ``clipcore.train`` puts it together.

======================  ====================================================================
``config.py``           the settings as a user gives them
``command_line.py``     the flags, made from the settings
``open_clip_flags.py``  open_clip's flags that are refused, and what other programs call a flag
``recipe.py``           the settings as a run has them: a value in every field
``setup.py``            what comes between the settings and the first step
``parts.py``            vocabulary, data and model, from the settings
``teacher.py``          a trained model whose probabilities are learnt too
``train_step.py``       a batch through towers, loss and gradients
``grad_cache.py``       a batch in micro-batches, with exact gradients
``memory_plan.py``      the size of a micro-batch, and how many graphs are kept
``duration.py``         how long a run takes on a CPU
``threads.py``          how many threads of the CPU are faster
``compiled.py``         the transformer blocks, compiled
``sharding.py``         a model split among the ranks, or whole on each
``optim.py``            AdamW, clipping, the moving average
``schedule.py``         the learning rate of a step
``faults.py``           numbers that no run can go on from
``saving.py``           when a checkpoint is due, and how the log goes on from it
``folders.py``          where runs live, and the settings in their folders
``state.py``            what a run is between two steps, in memory and in a checkpoint
``metrics.py``          what a run writes down
``collapse.py``         notices a run that has collapsed
``verify.py``           compares a step with float64
``profile.py``          where the time of a step goes
``traffic.py``          bytes and FLOPs of every operator
``flops.py``            FLOPs of the operators that torch does not count
``ceilings.py``         what a device can do at most
``memory.py``           what memory is in use, free, and the peak of a piece of work
======================  ====================================================================
"""
