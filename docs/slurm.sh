#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --requeue --signal=TERM@120
# sbatch docs/slurm.sh hybrid_a.py --out_dir=out/run --dataset=imagenet32 --batch_size=4096
# The script comes first, then --out_dir. A job that is queued again resumes its run.
set -e
folder=${2#--out_dir=}
[ "$folder" != "$2" ] || { echo "usage: slurm.sh SCRIPT --out_dir=FOLDER ..." >&2; exit 2; }
for saved in ckpt.pt ckpt-previous.pt; do
    [ -e "${folder/#\~/$HOME}/$saved" ] && set -- "$@" --resume=True && break
done
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_PER_NODE:-8}" --rdzv_backend=c10d \
    --rdzv_endpoint="$(scontrol show hostnames | head -1):${PORT:-29500}" "$@"
