from memkernel.cli import main

raise SystemExit(main())
