#!/bin/sh
# All that is asked of CUDA, on one card, in under 9 minutes: `sh benchmarks/gpu.sh [PYTHON]`.
#
# The CUDA tests, the update beside the textbook's at several batches, the time that the loop waits
# for data, and a run under torchrun with NCCL. Needs torch, torchvision, numpy, scikit-image,
# tensorboard, tqdm and pytest; nothing is downloaded. Ends with 1 where a test fails or a target
# is missed.
cd "$(dirname "$0")/.." || exit 2
python=${1:-python3}
export PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1
caches=$(mktemp -d) && trap 'rm -rf "$caches"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$caches
code=0

"$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 2
# compile side by side what is timed one after the other
for batch in 1 16 128; do
    "$python" benchmarks/step.py --device cuda --only --compile yes --batches $batch \
        > "$caches/$batch.log" 2>&1 &
done
timeout 200 "$python" -m pytest --noconftest -q -m cuda -p no:cacheprovider tests/test_step.py \
    tests/test_step_textbook.py tests/test_training.py tests/test_train.py \
    tests/test_train_torchrun.py tests/test_device.py tests/test_models_generator.py \
    tests/test_losses_history.py || code=1
wait
timeout 60 "$python" benchmarks/step.py --device cuda --compile no --batches 1 16 --repeats 5
timeout 150 "$python" benchmarks/step.py --device cuda --compile yes --batches 1 16 128 \
    --repeats 5 || code=1
timeout 90 "$python" benchmarks/loader.py --device cuda --parts waiting || code=1
exit $code
