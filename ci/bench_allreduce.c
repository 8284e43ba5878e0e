// What a plain MPI program reaches: MPI_Allreduce of floats, in place, summed. `ci/bench allreduce` puts this project's
// own all-reduce beside it (trainer/collectives/src/bench.rs), which measures in the same way.
//
//   mpirun -n N bench_allreduce SECONDS BYTES...
//
// Each size is tried first; then as many repetitions as fit SECONDS, 3 to 1000, each of which begins with a barrier and
// takes as long as its slowest rank. Rank 0 prints the median as one JSON object a line.

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

enum { FEWEST = 3, MOST = 1000 };

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double once(float *values, int len) {
    MPI_Barrier(MPI_COMM_WORLD);
    double began = MPI_Wtime();
    MPI_Allreduce(MPI_IN_PLACE, values, len, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    return MPI_Wtime() - began;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, ranks;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    double seconds = argc > 1 ? atof(argv[1]) : 0;
    for (int arg = 2; arg < argc; arg++) {
        long bytes = atol(argv[arg]);
        int len = (int)(bytes / (long)sizeof(float));
        float *values = malloc(bytes);
        double *times = malloc(MOST * sizeof(double));
        if (seconds <= 0 || len < 1 || !values || !times) {
            fprintf(stderr, "usage: bench_allreduce SECONDS BYTES...\n");
            MPI_Abort(MPI_COMM_WORLD, 2);
        }
        // Zeros stay zeros: sums of sums would overflow, and infinities must not decide a speed.
        for (int i = 0; i < len; i++) values[i] = 0.0f;
        once(values, len);
        double trial[2] = {once(values, len), once(values, len)};
        MPI_Allreduce(MPI_IN_PLACE, trial, 2, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        double fits = seconds / (trial[0] > trial[1] ? trial[0] : trial[1]);
        int repetitions = fits < FEWEST ? FEWEST : fits > MOST ? MOST : (int)fits;
        for (int repetition = 0; repetition < repetitions; repetition++) times[repetition] = once(values, len);
        MPI_Allreduce(MPI_IN_PLACE, times, repetitions, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
        if (rank == 0) {
            qsort(times, repetitions, sizeof(double), by_size);
            double median = (times[repetitions / 2] + times[(repetitions - 1) / 2]) / 2;
            printf("{\"bytes\": %ld, \"ranks\": %d, \"n\": %d, \"seconds\": %.9f, \"algbw_gb_s\": %.6f}\n",
                   bytes, ranks, repetitions, median, (double)bytes / median / 1e9);
            fflush(stdout);
        }
        free(times);
        free(values);
    }
    MPI_Finalize();
    return 0;
}
