# Every environment variable that the launch scripts set, with its reason. Sourced by them; what you have exported wins.
# NCCL's own choices are good on most clusters: nothing below changes how it reaches other ranks.

# CPU threads of a rank. All ranks of a node share its cores; without this each would start a thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# One hardware queue a GPU keeps kernels in launch order. Megatron-Core counts on it to start a tensor- or
# sequence-parallel collective ahead of the matrix product that it overlaps with (GPUs up to Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# NCCL speaks up when something is wrong, and only then. INFO shows which network and algorithms it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# How long torchrun waits for ranks after a stop signal, or after one of them failed, before it kills them. Its default,
# 30 s, is shorter than a step and a large checkpoint may take. An older torch does not know it and kills after its 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

# Compiled Triton kernels stay on the node: a shared home directory is slow, and not every file system locks well.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-cache-$(id -u)}"

# A rank that dies of a segmentation fault says where in Python it was.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"

# To be set where a cluster needs it:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the network interface of the first contact, e.g. eth0, where a node has several
#   NCCL_IB_HCA                              the InfiniBand adapters to use, e.g. mlx5, where some ports are for storage
#   NCCL_NVLS_ENABLE=0                       no NVLink multicast, for machines whose driver or container lacks it and where
#                                            NCCL fails at its first all-reduce; it is the faster way where it works
#   PYTORCH_ALLOC_CONF=expandable_segments:True   against fragmented GPU memory (PYTORCH_CUDA_ALLOC_CONF in an older torch);
#                                            with train.cuda_graphs=true it needs NCCL_GRAPH_REGISTER=0 as well
