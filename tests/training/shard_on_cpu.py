"""``slr train`` in processes on CPUs that accelerate takes for GPUs: it shards a model on GPUs alone."""

from accelerate import DistributedType, state

from slr_core.cli import main


def shard_on_cpu():
    initialize = state.PartialState.__init__

    def initialize_as_gpus(self, *arguments, **options):
        initialize(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = initialize_as_gpus


if __name__ == "__main__":
    shard_on_cpu()
    try:
        main()
    finally:
        assert state.PartialState._shared_state["distributed_type"] == DistributedType.FSDP
