export PYTHONPATH=.:runtime
python3 -c "import jinja2, click, numpy, cuda.bindings; print('ok')"
time python3 -m tests.gpu.sanitize linear_records 2>&1 | tail -15
python3 -m tests.gpu.sanitize quantize 2>&1 | tail -5
python3 -m tests.gpu.measure_records --weights w4 w2 w4-groups --variants "" "_MOST_STAGES=2" "_MOST_STAGES=4,_BUDGET_BYTES=112*1024" "_MOST_STAGES=2,_MULTIPROCESSORS=264,_BUDGET_BYTES=56*1024" 2>&1 | tail -20
