# docker build -t rdpm .                           NVIDIA GPUs; the host needs the driver and the container toolkit
# docker build -t rdpm --build-arg TORCH=cpu .     CPUs
# docker run --rm --gpus all rdpm                  is `rdpm doctor`
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" rdpm tokenize imagenet out/codes --tokenizer tokenizer.pt
# Not built yet: where this was written, no container could be.
FROM python:3.11-slim
ARG TORCH=cu130
# train.compile=true builds kernels with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rdpm_cli rdpm_cli
COPY recipes recipes
# In this folder, so that the versions that pyproject.toml pins are taken. Not here: play, ray and the trackers.
RUN uv pip install --system --no-cache --torch-backend "$TORCH" ".[audio,hub,parquet,timm]"
ENV RDPM_WEIGHTS=/data/weights
WORKDIR /data
ENTRYPOINT ["rdpm"]
CMD ["doctor"]
