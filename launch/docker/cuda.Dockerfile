# docker build -f launch/docker/cuda.Dockerfile -t opensora_jax:cuda .
FROM python:3.12-slim
WORKDIR /opensora_jax
COPY . .
RUN pip install --no-cache-dir -e '.[cuda]'
CMD ["python", "-m", "opensora_jax.train", "--help"]
