UNKNOWN = (
    "--xla_cpu_use_fusion_emitters=false"  # to libtpu, which reads XLA_FLAGS too, and exits where it does not know one
)

# XLA's flags for programs that run for a moment: compiled in a third of the time, and without YNNPACK, as main.py has it.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_experimental_ynn_fusion_type= "
    f"--xla_cpu_parallel_codegen_split_count=1 {UNKNOWN}"
)
