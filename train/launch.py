"""Fine-tune a backbone, on every rank that a launcher starts.

deepspeed --num_accelerators 2 train/launch.py --recipe demo --data DATA --run RUN
"""

try:
    from d2i.train.launch import main
except ModuleNotFoundError as err:
    raise SystemExit(
        f"{err}; install d2i in this Python: pip install -c constraints.txt -e '.[all]'"
    ) from err

if __name__ == "__main__":
    main()
